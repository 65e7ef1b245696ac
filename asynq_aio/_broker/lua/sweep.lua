-- sweep.lua: ids that once had no hash. With a hash again they go back to pending; after a day they are forgotten.
--
-- KEYS   1  asynq:{q}:aio:ghost  ZSET  id -> found, Unix seconds      2  asynq:{q}:pending  LIST  ids, newest left
-- ARGV   1  forget what was found up to this moment, Unix seconds     2  how many at most    3  prefix of task hashes (same hash tag)
-- Returns {put back, forgotten}.
-- include: look
local back, gone = {}, {}
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, tonumber(ARGV[2]) - 1)) do
  local fields = redis.pcall('HMGET', ARGV[3] .. id, 'msg', 'state')
  if not failed(fields) and fields[1] then
    -- Enqueued anew under the same id, it may stand in its place already.
    if fields[2] == 'pending' and not redis.call('LPOS', KEYS[2], id) then back[#back + 1] = id end
    gone[#gone + 1] = id
  end
end
variadic('ZREM', KEYS[1], gone)
local forgotten = redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[1])
variadic('LPUSH', KEYS[2], back)
return {#back, forgotten}
