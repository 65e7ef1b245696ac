-- lend.lua: tasks that stand in `active` without a lease get one, so that the rule of expired leases reaches them.
--
-- KEYS   1  asynq:{q}:active  LIST  ids      2  asynq:{q}:lease  ZSET  id -> expiry, Unix seconds
-- ARGV   1  expiry of the new leases, Unix seconds      then the ids
-- Returns the ids that got one.
--
-- The first write (ZREM of nothing) is one that a full Redis allows.
local given = {}
redis.call('ZREM', KEYS[2], '')
for i = 2, #ARGV do
  if redis.call('LPOS', KEYS[1], ARGV[i]) and redis.call('ZADD', KEYS[2], 'NX', ARGV[1], ARGV[i]) == 1 then
    given[#given + 1] = ARGV[i]
  end
end
return given
