-- adopt.lua: what did a claim take whose reply was lost? After this it takes nothing more.
--
-- KEYS
--   1  asynq:{q}:aio:fence:<server>  STRING  claims up to this number were given up
--   2  asynq:{q}:active              LIST    ids
--   3  asynq:{q}:lease               ZSET    id -> expiry, Unix seconds
-- ARGV
--   1  owner of that claim, <host>:<pid>:<server id>/<number>    2  its number    3  the lease expiry it sent, Unix seconds
--   4  the fence's life, seconds    5  prefix of task hashes (found inside, same hash tag)
-- Returns {status, id, msg, "", id, msg, "" ...}, as a claim does; status "whole", or "tryagain": the slot is moving and some could not be seen.
--
-- A score above the claim's own means that another server has the task by now, though Go leaves our owner in the hash.
-- include: look
local number = tonumber(ARGV[2])
local fence = redis.call('GET', KEYS[1])
local reply = {'whole'}
for _, id in ipairs(redis.call('LRANGE', KEYS[2], 0, -1)) do
  local fields = redis.pcall('HMGET', ARGV[5] .. id, 'aio_owner', 'msg')
  if unreachable(fields) then
    reply[1] = 'tryagain'
  elseif not failed(fields) and fields[1] == ARGV[1] and fields[2] then
    local score = redis.call('ZSCORE', KEYS[3], id)
    if score and tonumber(score) <= tonumber(ARGV[3]) then
      reply[#reply + 1] = id
      reply[#reply + 1] = fields[2]
      reply[#reply + 1] = ''
    end
  end
end
if not fence or tonumber(fence) < number then
  redis.call('PERSIST', KEYS[1]) -- a write that a full Redis allows, before the one that it would refuse
  redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[4])
end
return reply
