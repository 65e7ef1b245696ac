-- announce.lua: ZADD of one member, for a full Redis: the first write (PERSIST, of nothing) is one that it allows.
--
-- KEYS   1  asynq:servers or asynq:workers  ZSET  key name -> expiry, Unix seconds      ARGV   1  expiry    2  key name
redis.call('PERSIST', KEYS[1])
return redis.call('ZADD', KEYS[1], ARGV[1], ARGV[2])
