-- presence.lua: a server and what it works on, visible for ttl seconds more.
--
-- KEYS   1  asynq:servers:{<host>:<pid>:<server id>}  STRING  ServerInfo
--        2  asynq:workers:{<host>:<pid>:<server id>}  HASH    task id -> WorkerInfo
-- ARGV   1  ttl, seconds    2  ServerInfo    then task id, WorkerInfo for each running task
-- The first write (PERSIST) is one that a full Redis allows. The hash does not vanish on the way (see _look.lua).
-- include: look
local running, over = {}, {}
for i = 3, #ARGV, 2 do running[ARGV[i]] = true end
for _, id in ipairs(redis.call('HKEYS', KEYS[2])) do
  if not running[id] then over[#over + 1] = id end
end
redis.call('PERSIST', KEYS[2])
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[1])
if #ARGV > 2 then
  for first = 3, #ARGV, 1000 do
    redis.call('HSET', KEYS[2], unpack(ARGV, first, math.min(first + 999, #ARGV)))
  end
  redis.call('EXPIRE', KEYS[2], ARGV[1])
  variadic('HDEL', KEYS[2], over)
elseif #over > 0 then
  redis.call('DEL', KEYS[2])
end
return 1
