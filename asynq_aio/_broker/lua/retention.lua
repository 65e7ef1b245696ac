-- retention.lua: completed tasks past their time go.
--
-- KEYS   1  asynq:{q}:completed  ZSET  id -> delete after, Unix seconds
--        2  asynq:{q}:pending    not touched: a script with two keys is never sent to the node that a slot moves to. There a
--           hash that has not arrived looks like one that is gone, and would come after its id has been forgotten.
-- ARGV   1  now, Unix seconds; "" = Redis' own clock    2  how many at most    3  prefix of task hashes (same hash tag)
-- Returns {deleted, left}: left = out of reach, the slot is moving; they stay as they are.
-- include: look
local now = ARGV[1] ~= '' and ARGV[1] or redis.call('TIME')[1]
local gone, left = {}, 0
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], '-inf', now, 'BYSCORE', 'LIMIT', 0, ARGV[2])) do
  if failed(redis.pcall('DEL', ARGV[3] .. id)) then
    left = left + 1
  else
    gone[#gone + 1] = id
  end
end
variadic('ZREM', KEYS[1], gone)
return {#gone, left}
