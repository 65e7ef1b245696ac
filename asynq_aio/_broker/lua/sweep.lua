-- sweep.lua: ids that once had no hash. With a hash again they go back to pending; after a day they are forgotten.
--
-- KEYS   1  asynq:{q}:aio:ghost  ZSET  id -> found, Unix seconds      2  asynq:{q}:pending    LIST  ids, newest left
--        3  asynq:{q}:retry      ZSET  id -> due, Unix seconds        4  asynq:{q}:scheduled  ZSET  id -> due, Unix seconds
-- ARGV   1  forget what was found up to this moment, Unix seconds     2  how many at most    3  prefix of task hashes (same hash tag)
-- Returns {put back, forgotten}.
--
-- The first write (ZREM) is one that a full Redis allows.
-- include: look
local lists = {retry = KEYS[3], scheduled = KEYS[4]}
local back, gone, due = {}, {}, {}
local forgotten = 0
local ghosts = redis.call('ZRANGE', KEYS[1], 0, tonumber(ARGV[2]) - 1, 'WITHSCORES')
for i = 1, #ghosts, 2 do
  local id, found = ghosts[i], tonumber(ghosts[i + 1])
  local fields = redis.pcall('HMGET', ARGV[3] .. id, 'msg', 'state')
  if unreachable(fields) then
    -- It may have a hash, on the other side: however old, it stays.
  elseif not failed(fields) and fields[1] then
    -- Enqueued anew under the same id, it may stand in its place already.
    local list = lists[fields[2]]
    if fields[2] == 'pending' then
      if not redis.call('LPOS', KEYS[2], id) then back[#back + 1] = id end
    elseif list and not redis.call('ZSCORE', list, id) then
      back[#back + 1] = id
      due[#due + 1] = id -- as it was when a forwarder met it
    end
    gone[#gone + 1] = id
  elseif found <= tonumber(ARGV[1]) then
    gone[#gone + 1] = id
    forgotten = forgotten + 1
  end
end
if #back > 0 then redis.call('LLEN', KEYS[2]) end
variadic('ZREM', KEYS[1], gone)
local time = redis.call('TIME')
for _, id in ipairs(due) do
  redis.call('HSET', ARGV[3] .. id, 'state', 'pending', 'pending_since', time[1] .. string.format('%06d', time[2]) .. '000')
  redis.call('HDEL', ARGV[3] .. id, 'aio_due_ns', 'aio_group')
end
variadic('LPUSH', KEYS[2], back)
return {#back, forgotten}
