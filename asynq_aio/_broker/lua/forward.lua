-- forward.lua: due tasks of scheduled or retry -> pending, or into their group.
--
-- KEYS
--   1  asynq:{q}:scheduled or asynq:{q}:retry  ZSET  id -> due, Unix seconds
--   2  asynq:{q}:pending   LIST  ids, newest left       3  asynq:{q}:groups  SET  names of the groups that have members
--   4  asynq:{q}:aio:ghost ZSET  id without a hash -> found, Unix seconds
-- ARGV
--   1  now, Unix ns; "" = Redis' own clock    2  how many to move at most    3  prefix of task hashes    4  prefix of groups
--      (both found inside, same hash tag)     5  "1": KEYS[1] is scheduled, the fields aio_due_ns and aio_group count
-- Returns {moved, left, next}: tasks moved; due ones left in place (the slot is moving); the next due moment, Unix ns, "" = none.
--
-- A score is the due second, cut off; where the moment lies inside it, aio_due_ns says so as long as its second is the score.
-- Only the current second can hold such ids, so it alone is looked through to its end.
-- The first write (ZREM) is one that a full Redis allows. A container of a wrong type refuses the call whole.
-- include: look
local now_ns = ARGV[1]
if now_ns == '' then
  local t = redis.call('TIME')
  now_ns = t[1] .. string.format('%06d', t[2]) .. '000'
end
local now_s = string.sub(now_ns, 1, -10)
if now_s == '' then now_s = '0' end
local limit, scheduled = tonumber(ARGV[2]), ARGV[5] == '1'

local leaving, tasks, groups, ghosts = {}, {}, {}, {}
local left, next_ns, offset, done = 0, nil, 0, false
while not done do
  local page = redis.call('ZRANGE', KEYS[1], '-inf', now_s, 'BYSCORE', 'LIMIT', offset, limit, 'WITHSCORES')
  if #page == 0 then break end
  for i = 1, #page, 2 do
    if #leaving >= limit then
      done = true
      break
    end
    local id, score = page[i], page[i + 1]
    local task = ARGV[3] .. id
    local fields = redis.pcall('HMGET', task, 'msg', 'group', 'aio_group', 'aio_due_ns')
    if unreachable(fields) then
      left = left + 1
    elseif failed(fields) or not fields[1] then
      leaving[#leaving + 1] = id
      ghosts[#ghosts + 1] = id
    else
      local due_ns = scheduled and fields[4]
      -- Both are decimal text of one length until the year 2286: no number of Lua's holds a nanosecond.
      if due_ns and score == now_s and string.sub(due_ns, 1, -10) == score and due_ns > now_ns then
        if not next_ns or due_ns < next_ns then next_ns = due_ns end
      else
        local group = fields[2]
        if (not group or group == '') and scheduled then group = fields[3] end
        if group and group ~= '' then
          local look = redis.pcall('ZCARD', ARGV[4] .. group)
          if unreachable(look) then
            left = left + 1
          elseif failed(look) then -- no set: the task runs alone rather than never
            leaving[#leaving + 1] = id
            tasks[#tasks + 1] = id
          else
            leaving[#leaving + 1] = id
            groups[#groups + 1] = {id = id, group = group}
          end
        else
          leaving[#leaving + 1] = id
          tasks[#tasks + 1] = id
        end
      end
    end
  end
  offset = offset + limit
end

if not next_ns then
  local after = redis.call('ZRANGE', KEYS[1], '(' .. now_s, '+inf', 'BYSCORE', 'LIMIT', 0, 1, 'WITHSCORES')
  if #after > 0 and after[2] ~= 'inf' then next_ns = string.format('%.0f', tonumber(after[2])) .. '000000000' end
end
if #leaving > 0 then
  if #tasks > 0 then redis.call('LLEN', KEYS[2]) end
  if #groups > 0 then redis.call('SCARD', KEYS[3]) end
  if #ghosts > 0 then redis.call('ZCARD', KEYS[4]) end
  variadic('ZREM', KEYS[1], leaving)
  for _, id in ipairs(tasks) do
    redis.call('HSET', ARGV[3] .. id, 'state', 'pending', 'pending_since', now_ns)
    redis.call('HDEL', ARGV[3] .. id, 'aio_due_ns', 'aio_group')
  end
  variadic('LPUSH', KEYS[2], tasks)
  for _, member in ipairs(groups) do
    redis.call('ZADD', ARGV[4] .. member.group, now_s, member.id)
    redis.call('SADD', KEYS[3], member.group)
    redis.call('HSET', ARGV[3] .. member.id, 'state', 'aggregating', 'group', member.group)
    redis.call('HDEL', ARGV[3] .. member.id, 'aio_due_ns', 'aio_group')
  end
  for _, id in ipairs(ghosts) do
    redis.call('ZADD', KEYS[4], now_s, id)
  end
end
return {#leaving, left, next_ns or ''}
