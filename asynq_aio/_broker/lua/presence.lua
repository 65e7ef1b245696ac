-- presence.lua: a server and what it works on, visible for ttl seconds more.
--
-- KEYS   1  asynq:servers:{<host>:<pid>:<server id>}  STRING  ServerInfo
--        2  asynq:workers:{<host>:<pid>:<server id>}  HASH    task id -> WorkerInfo
-- ARGV   1  ttl, seconds    2  ServerInfo    then task id, WorkerInfo for each running task
-- The first write (DEL) is one that a full Redis allows.
redis.call('DEL', KEYS[2])
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[1])
if #ARGV > 2 then
  for first = 3, #ARGV, 1000 do
    redis.call('HSET', KEYS[2], unpack(ARGV, first, math.min(first + 999, #ARGV)))
  end
  redis.call('EXPIRE', KEYS[2], ARGV[1])
end
return 1
