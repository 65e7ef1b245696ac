-- claim.lua: pending -> active, up to n tasks, the oldest first.
--
-- KEYS
--   1  asynq:{q}:pending             LIST    ids, newest left
--   2  asynq:{q}:paused              STRING  only its existence counts
--   3  asynq:{q}:active              LIST    ids
--   4  asynq:{q}:lease               ZSET    id -> expiry, Unix seconds
--   5  asynq:{q}:aio:fence:<server>  STRING  claims up to this number were given up
--   6  asynq:{q}:aio:ghost           ZSET    id without a hash -> found, Unix seconds
-- ARGV
--   1  owner, <host>:<pid>:<server id>    2  claim number, rising per server    3  lease expiry, Unix seconds
--   4  n    5  most bytes of messages; one task is always taken    6  prefix of task hashes (found inside, same hash tag)
-- Returns {status, id, msg, pending_since, id, msg, pending_since ...} (pending_since: Unix ns, "" = not known); status:
--   "tasks"     at least one      "empty"  the list is      "paused"   the queue is
--   "fenced"    this claim was given up: a late first copy  "tryagain" the slot is moving: nothing could be reached
--
-- Every id is looked at before the first write; one that cannot be reached stays in its place. A container of a wrong
-- type refuses the call whole: nobody has left `pending` then.
-- The first write (RPOP or LREM) is allowed in a full Redis.
-- include: look
local fence = redis.call('GET', KEYS[5])
if fence and tonumber(fence) >= tonumber(ARGV[2]) then return {'fenced'} end
if redis.call('EXISTS', KEYS[2]) == 1 then return {'paused'} end

local n, bytes_left, prefix = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local ids = redis.call('LRANGE', KEYS[1], -n, -1)
if #ids == 0 then return {'empty'} end
local reply, tasks, ghosts, stay, keys = {'tasks'}, {}, {}, {}, {}
local looked = 0
for i = #ids, 1, -1 do
  local id = ids[i]
  local task = prefix .. id
  local fields = redis.pcall('HMGET', task, 'msg', 'pending_since')
  if unreachable(fields) then
    stay[#stay + 1] = id
  elseif failed(fields) or not fields[1] then
    ghosts[#ghosts + 1] = id
  else
    bytes_left = bytes_left - #fields[1]
    if bytes_left < 0 and #tasks > 0 then break end
    tasks[#tasks + 1] = id
    keys[#keys + 1] = task
    reply[#reply + 1] = id
    reply[#reply + 1] = fields[1]
    reply[#reply + 1] = fields[2] or ''
  end
  looked = looked + 1
end
if #tasks == 0 and #ghosts == 0 then return {'tryagain'} end
if #tasks > 0 then
  redis.call('LLEN', KEYS[3])
  redis.call('ZCARD', KEYS[4])
end
if #ghosts > 0 then redis.call('ZCARD', KEYS[6]) end

if #stay == 0 then
  redis.call('RPOP', KEYS[1], looked)
else
  for _, id in ipairs(tasks) do redis.call('LREM', KEYS[1], -1, id) end
  for _, id in ipairs(ghosts) do redis.call('LREM', KEYS[1], -1, id) end
end
if #ghosts > 0 then
  local now = redis.call('TIME')[1]
  for _, id in ipairs(ghosts) do
    redis.call('ZADD', KEYS[6], now, id)
  end
  if #tasks == 0 then return {'tasks'} end
end
local owner, expiry = ARGV[1] .. '/' .. ARGV[2], ARGV[3]
local leases = {}
for i, id in ipairs(tasks) do
  redis.call('HSET', keys[i], 'state', 'active', 'aio_owner', owner)
  redis.call('HDEL', keys[i], 'pending_since', 'aio_due_ns', 'aio_group')
  leases[#leases + 1] = expiry
  leases[#leases + 1] = id
end
variadic('LPUSH', KEYS[3], tasks)
variadic('ZADD', KEYS[4], leases)
return reply
