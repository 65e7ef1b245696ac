-- enqueue.lua: many new tasks -> pending, scheduled or a group; one verdict each; a repeat of the call changes nothing.
--
-- KEYS
--   1  asynq:{q}:aio:enq:<client>  STRING  number and verdicts of this client's last call to this queue
--   2  asynq:{q}:pending           LIST    ids, newest left
--   3  asynq:{q}:scheduled         ZSET    id -> due, Unix seconds
--   4  asynq:{q}:groups            SET     names of the groups that have members
--   then for each task, in order:
--      asynq:{q}:t:<id>            HASH
--      asynq:{q}:g:<group>         ZSET    id -> time added, Unix seconds; only of kind "g"
--      its unique lock             STRING  holder's id; only where ttl > 0
-- ARGV
--   1  call number, rising per client and queue    2  the ledger's life, ms    3  now, Unix ns
--   4  now, Unix seconds    5  channel of due times    6  queue name
--   then for each task:
--      "p" id msg                              to pending
--      "u" id msg ttl                          to pending, with a lock of ttl seconds
--      "s" id msg ttl due_s due_ns group       to scheduled; due_ns "" = a whole second, group "" = none, ttl 0 = no lock
--      "g" id msg ttl group                    to the group; ttl 0 = no lock
-- Returns an array with one entry for each task: 1 = enqueued, 0 = the id is taken, {holder} = the lock is held by that id,
--   "text" = refused with this error. An empty array: a call with a higher number has been here, nothing was done.
--
-- The first write is one that a full Redis refuses, so that a refused call leaves nothing behind.
local number = tonumber(ARGV[1])
local ledger = redis.call('GET', KEYS[1])
if ledger then
  local last = cmsgpack.unpack(ledger)
  if last[1] == number then return last[2] end
  if last[1] > number then return {} end
end

local now_ns, now_s = ARGV[3], ARGV[4]
local verdicts, ids_pending, writes = {}, {}, {}
local taken, locked = {}, {}
local scheduled_error, groups_error
local first_due
local key, arg = 5, 7
while arg <= #ARGV do
  local kind, id, msg = ARGV[arg], ARGV[arg + 1], ARGV[arg + 2]
  local write = {kind = kind, id = id, msg = msg, task = KEYS[key]}
  local ttl, refused = 0, nil
  key = key + 1
  if kind == 'p' then
    arg = arg + 3
  elseif kind == 'u' then
    ttl = tonumber(ARGV[arg + 3])
    arg = arg + 4
  elseif kind == 's' then
    ttl = tonumber(ARGV[arg + 3])
    write.due, write.due_ns, write.group = ARGV[arg + 4], ARGV[arg + 5], ARGV[arg + 6]
    arg = arg + 7
    if scheduled_error == nil then
      local look = redis.pcall('ZCARD', KEYS[3])
      scheduled_error = type(look) == 'table' and look.err or false
    end
    refused = scheduled_error
  else
    ttl = tonumber(ARGV[arg + 3])
    write.group = ARGV[arg + 4]
    write.group_key = KEYS[key]
    arg, key = arg + 5, key + 1
    if groups_error == nil then
      local look = redis.pcall('SCARD', KEYS[4])
      groups_error = type(look) == 'table' and look.err or false
    end
    local look = redis.pcall('ZCARD', write.group_key)
    refused = groups_error or (type(look) == 'table' and look.err)
  end
  local holder = false
  if ttl > 0 then
    write.lock, write.ttl = KEYS[key], ttl
    key = key + 1
    holder = locked[write.lock] or redis.pcall('GET', write.lock)
    if type(holder) == 'table' then holder = '' end -- no string: held by nobody who could release it
  end
  if holder then
    verdicts[#verdicts + 1] = {holder}
  elseif taken[write.task] or redis.call('EXISTS', write.task) == 1 then
    verdicts[#verdicts + 1] = 0
  elseif refused then
    verdicts[#verdicts + 1] = refused
  else
    verdicts[#verdicts + 1] = 1
    taken[write.task] = true
    if write.lock then locked[write.lock] = id end
    writes[#writes + 1] = write
    if kind == 'p' or kind == 'u' then
      ids_pending[#ids_pending + 1] = id
    elseif kind == 's' and (not first_due or tonumber(write.due) < first_due) then
      first_due = tonumber(write.due)
    end
  end
end

local head
if first_due then head = redis.call('ZRANGE', KEYS[3], 0, 0, 'WITHSCORES') end
-- The list first: where it is no list, or memory is full, nothing has been written yet.
for first = 1, #ids_pending, 1000 do
  redis.call('LPUSH', KEYS[2], unpack(ids_pending, first, math.min(first + 999, #ids_pending)))
end
for _, w in ipairs(writes) do
  if w.kind == 'p' then
    redis.call('HSET', w.task, 'msg', w.msg, 'state', 'pending', 'pending_since', now_ns)
  elseif w.kind == 'u' then
    redis.call('HSET', w.task, 'msg', w.msg, 'state', 'pending', 'pending_since', now_ns, 'unique_key', w.lock)
  elseif w.kind == 's' then
    redis.call('ZADD', KEYS[3], w.due, w.id)
    redis.call('HSET', w.task, 'msg', w.msg, 'state', 'scheduled')
    if w.lock then redis.call('HSET', w.task, 'unique_key', w.lock) end
    if w.due_ns ~= '' then redis.call('HSET', w.task, 'aio_due_ns', w.due_ns) end
    if w.group ~= '' then redis.call('HSET', w.task, 'aio_group', w.group) end
  else
    redis.call('ZADD', w.group_key, now_s, w.id)
    redis.call('SADD', KEYS[4], w.group)
    redis.call('HSET', w.task, 'msg', w.msg, 'state', 'aggregating', 'group', w.group)
    if w.lock then redis.call('HSET', w.task, 'unique_key', w.lock) end
  end
  if w.lock then redis.call('SET', w.lock, w.id, 'EX', w.ttl) end
end
redis.call('SET', KEYS[1], cmsgpack.pack({number, verdicts}), 'PX', ARGV[2])
-- Nobody is due earlier: tell the forwarders. An ACL may forbid it; they look every 5 s anyway.
if first_due and (#head == 0 or tonumber(head[2]) >= first_due) then
  redis.pcall('PUBLISH', ARGV[5], ARGV[6])
end
return verdicts
