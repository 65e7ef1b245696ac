-- result.lua: the result of a running task; never makes a hash for a task that is gone.
--
-- KEYS   1  asynq:{q}:t:<id>  HASH      ARGV   1  result
-- Returns 1, or 0: no such task.
if redis.call('HEXISTS', KEYS[1], 'msg') == 0 then return 0 end
redis.call('HSET', KEYS[1], 'result', ARGV[1])
return 1
