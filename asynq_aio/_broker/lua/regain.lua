-- regain.lua: raise the leases that these owners still hold. One that is gone, or another's, stays as it is.
--
-- KEYS
--   1  asynq:{q}:lease  ZSET  id -> expiry, Unix seconds       then for each task: asynq:{q}:t:<id> HASH
-- ARGV
--   1  new expiry, Unix seconds    then for each task: id, its aio_owner, the highest expiry that this server is known to
--      have given it, and those that it sent without hearing of them, blanks between
-- Returns an array with one number for each task: 1 raised, 0 lost, 3 out of reach (the slot is moving)
--
-- A score above that is another's (Go's servers leave our owner in the hash), unless it is one of the unheard ones. So this
-- call is not repeated: its own score proves nothing, Go's heartbeat writes the same within the same second.
-- The first write (ZREM of nothing) is one that a full Redis allows.
-- include: look
local verdicts = {}
redis.call('ZREM', KEYS[1], '')
for i = 1, #KEYS - 1 do
  local id, owner, highest, unheard = ARGV[4 * i - 2], ARGV[4 * i - 1], tonumber(ARGV[4 * i]), ARGV[4 * i + 1]
  local fields = redis.pcall('HMGET', KEYS[i + 1], 'aio_owner', 'state')
  local score = redis.call('ZSCORE', KEYS[1], id)
  if unreachable(fields) then
    verdicts[i] = 3
  elseif not failed(fields) and fields[1] == owner and fields[2] == 'active'
      and score and (tonumber(score) <= highest
        or string.find(' ' .. unheard .. ' ', ' ' .. score .. ' ', 1, true)) then
    redis.call('ZADD', KEYS[1], 'XX', 'GT', ARGV[1], id)
    verdicts[i] = 1
  else
    verdicts[i] = 0
  end
end
return verdicts
