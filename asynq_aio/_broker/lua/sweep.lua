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
local going = {}
for _, id in ipairs(gone) do going[id] = true end
local forgotten = 0
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], '-inf', ARGV[1], 'BYSCORE', 'LIMIT', 0, ARGV[2])) do
  if not going[id] then
    gone[#gone + 1] = id
    forgotten = forgotten + 1
  end
end
variadic('ZREM', KEYS[1], gone)
variadic('LPUSH', KEYS[2], back)
return {#back, forgotten}
