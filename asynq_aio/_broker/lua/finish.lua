-- finish.lua: active -> gone, completed, retry, archived or back to pending; many tasks, one verdict each.
--
-- KEYS
--   1  asynq:{q}:active     LIST    ids                      2  asynq:{q}:lease      ZSET  id -> expiry, Unix seconds
--   3  asynq:{q}:pending    LIST    ids, next right          4  asynq:{q}:retry      ZSET  id -> due, Unix seconds
--   5  asynq:{q}:archived   ZSET    id -> archived at        6  asynq:{q}:completed  ZSET  id -> delete after, Unix seconds
--   7  asynq:{q}:processed  STRING  counter                  8  asynq:{q}:failed     STRING  counter
--   9  asynq:{q}:processed:<day>  STRING  counter           10  asynq:{q}:failed:<day>  STRING  counter
--   then for each task, in order: asynq:{q}:t:<id> HASH, and its unique lock where "lock" is 1
-- ARGV
--   1  expiry of the day's counters, Unix seconds    2  now, Unix seconds    3  archive: drop up to this score
--   4  archive: keep fewer than this many            5  prefix of task hashes (found inside, same hash tag)
--   6  channel of due times                          7  queue name
--   then for each task: kind id owner guard score, and by kind
--      owner  must be the hash's aio_owner; "" = not asked
--      guard  "max" = the lease's score must not be above `score`; "is" = it must be `score`, and a lease of nothing goes:
--             one whose id is not in `active`
--      "d" lock                       done: deleted
--      "c" lock msg expiry has result completed, kept until expiry; result written where has is 1
--      "r" msg due failure            retry at due; counted as a failure where failure is 1
--      "a" msg reason                 archived; reason "" = it stands in the message
--      "q" now_ns recovered           back to pending, next to be taken; recovered 1 = count it in aio_recovered
-- Returns an array with one number for each task:
--   1 written    0 lost: somebody else has the task, or it is gone    2 not ours, but as if this call had been here before
--   3 out of reach, the slot is moving: untouched
--
-- All looks come before the first write; the first write (LREM, LTRIM or DEL active) is one that a full Redis allows. A container
-- of a wrong type refuses the call whole: nobody has left `active` then.
-- include: look
local prefix = ARGV[5]
local entries, ids = {}, {}
local key, arg = 11, 8
while arg <= #ARGV do
  local e = {kind = ARGV[arg], id = ARGV[arg + 1], owner = ARGV[arg + 2], guard = ARGV[arg + 3],
             score = tonumber(ARGV[arg + 4]), task = KEYS[key]}
  key, arg = key + 1, arg + 5
  if e.kind == 'd' then
    e.lock = ARGV[arg] == '1'
    arg = arg + 1
  elseif e.kind == 'c' then
    e.lock, e.msg, e.at, e.has, e.result = ARGV[arg] == '1', ARGV[arg + 1], ARGV[arg + 2], ARGV[arg + 3], ARGV[arg + 4]
    arg = arg + 5
  elseif e.kind == 'r' then
    e.msg, e.at, e.failure = ARGV[arg], ARGV[arg + 1], ARGV[arg + 2] == '1'
    arg = arg + 3
  elseif e.kind == 'a' then
    e.msg, e.reason = ARGV[arg], ARGV[arg + 1]
    arg = arg + 2
  else
    e.now_ns, e.recovered = ARGV[arg], ARGV[arg + 1] == '1'
    arg = arg + 2
  end
  if e.lock then
    e.lock = KEYS[key]
    key = key + 1
  end
  entries[#entries + 1] = e
  ids[#ids + 1] = e.id
end

local scores = {}
for first = 1, #ids, 1000 do
  local part = redis.call('ZMSCORE', KEYS[2], unpack(ids, first, math.min(first + 999, #ids)))
  for i = 1, #part do scores[first + i - 1] = part[i] end
end
local verdicts, ours = {}, {}
for i, e in ipairs(entries) do
  local owner = redis.pcall('HGET', e.task, 'aio_owner')
  local score = scores[i] and tonumber(scores[i])
  if unreachable(owner) then
    verdicts[i] = 3
  elseif score and not failed(owner) and (e.owner == '' or owner == e.owner)
      and ((e.guard == 'max' and score <= e.score) or (e.guard == 'is' and score == e.score)) then
    verdicts[i] = 1
    ours[#ours + 1] = i
  else
    verdicts[i] = 0
  end
end

local goes_to = {c = 6, r = 4, a = 5}
local requeues = false
local looked = {}
for _, i in ipairs(ours) do
  local container = goes_to[entries[i].kind]
  if container and not looked[container] then
    looked[container] = true
    redis.call('ZCARD', KEYS[container])
  end
  requeues = requeues or entries[i].kind == 'q'
end
if requeues then redis.call('LLEN', KEYS[3]) end

local leases = {}
local function not_active(i)
  verdicts[i] = 0
  if entries[i].guard == 'is' then leases[#leases + 1] = entries[i].id end
end

-- Off the list of active tasks: one by one for a few, one pass for many (with 1,000 long tasks in it: 8 instead of 41 us a task).
if #ours > 0 and #ours <= 3 then
  local left = redis.call('LLEN', KEYS[1])
  for _, i in ipairs(ours) do
    if left > 0 and redis.call('LREM', KEYS[1], -1, entries[i].id) == 1 then
      left = left - 1
    else
      not_active(i)
    end
  end
elseif #ours > 3 then
  local leaving, rest = {}, {}
  local left = 0
  for _, i in ipairs(ours) do
    if leaving[entries[i].id] then
      verdicts[i] = 0 -- twice in one call: once is enough
    else
      leaving[entries[i].id] = i
      left = left + 1
    end
  end
  local list = redis.call('LRANGE', KEYS[1], 0, -1)
  for _, id in ipairs(list) do
    if leaving[id] then
      if leaving[id] ~= true then left = left - 1 end
      leaving[id] = true
    else
      rest[#rest + 1] = id
    end
  end
  if #rest == 0 then
    redis.call('DEL', KEYS[1])
  elseif #rest < #list then
    -- What stays is put behind the list, then the list is cut off; it never vanishes meanwhile (see _look.lua).
    redis.call('LTRIM', KEYS[1], 0, -1)
    variadic('RPUSH', KEYS[1], rest)
    redis.call('LTRIM', KEYS[1], #list, -1)
  end
  if left > 0 then
    for _, i in ipairs(ours) do
      if leaving[entries[i].id] ~= true then not_active(i) end
    end
  end
end

local pending = {}
local processed, failures, archived, first_retry = 0, 0, false, nil
local head
for i, e in ipairs(entries) do
  if verdicts[i] == 1 then
    leases[#leases + 1] = e.id
    if e.kind == 'd' then
      redis.call('DEL', e.task)
      processed = processed + 1
    elseif e.kind == 'c' then
      redis.call('ZADD', KEYS[6], e.at, e.id)
      redis.call('HSET', e.task, 'msg', e.msg, 'state', 'completed')
      if e.has == '1' then redis.call('HSET', e.task, 'result', e.result) end
      redis.call('HDEL', e.task, 'aio_owner')
      processed = processed + 1
    elseif e.kind == 'r' then
      if not head then head = redis.call('ZRANGE', KEYS[4], 0, 0, 'WITHSCORES') end
      if not first_retry or tonumber(e.at) < first_retry then first_retry = tonumber(e.at) end
      redis.call('ZADD', KEYS[4], e.at, e.id)
      redis.call('HSET', e.task, 'msg', e.msg, 'state', 'retry')
      redis.call('HDEL', e.task, 'aio_owner')
      if e.failure then
        processed = processed + 1
        failures = failures + 1
      end
    elseif e.kind == 'a' then
      redis.call('ZADD', KEYS[5], ARGV[2], e.id)
      redis.call('HSET', e.task, 'msg', e.msg, 'state', 'archived')
      if e.reason ~= '' then redis.call('HSET', e.task, 'aio_reason', e.reason) end
      redis.call('HDEL', e.task, 'aio_owner')
      processed = processed + 1
      failures = failures + 1
      archived = true
    else
      pending[#pending + 1] = e.id
      redis.call('HSET', e.task, 'state', 'pending', 'pending_since', e.now_ns)
      redis.call('HDEL', e.task, 'aio_owner')
      if e.recovered and failed(redis.pcall('HINCRBY', e.task, 'aio_recovered', 1)) then
        redis.call('HSET', e.task, 'aio_recovered', 1) -- it held no number
      end
    end
    if e.lock and redis.pcall('GET', e.lock) == e.id then redis.call('DEL', e.lock) end
  elseif verdicts[i] == 0 then
    -- Not ours. The same call may have been here before, its reply lost: does the task look as this call would leave it?
    if e.kind == 'd' then
      if redis.pcall('EXISTS', e.task) == 0 then verdicts[i] = 2 end
    elseif e.kind == 'q' then
      if redis.pcall('HGET', e.task, 'state') == 'pending' then verdicts[i] = 2 end
    elseif redis.pcall('HGET', e.task, 'msg') == e.msg then
      verdicts[i] = 2
    end
  end
end
variadic('ZREM', KEYS[2], leases)
variadic('RPUSH', KEYS[3], pending)

-- Counters as Go keeps them: the day's get their expiry with the first count, the totals go back to 1 at the top. One that
-- holds no number is left as it is: the tasks are written, and statistics must not undo that.
local function count(day_key, n)
  if n > 0 and redis.pcall('INCRBY', day_key, n) == n then redis.call('EXPIREAT', day_key, ARGV[1]) end
end
count(KEYS[9], processed)
count(KEYS[10], failures)
if processed > 0 then
  local top = 9223372036854775807
  local function total()
    local text = redis.pcall('GET', KEYS[7])
    return type(text) == 'string' and tonumber(text) or 0
  end
  if total() + processed < top then
    redis.pcall('INCRBY', KEYS[7], processed)
    if failures > 0 then redis.pcall('INCRBY', KEYS[8], failures) end
  else
    -- Only `processed` is tested, and both begin again with it.
    for n = 1, processed do
      if total() == top then
        redis.call('SET', KEYS[7], 1)
        if n <= failures then redis.call('SET', KEYS[8], 1) end
      else
        redis.pcall('INCR', KEYS[7])
        if n <= failures then redis.pcall('INCR', KEYS[8]) end
      end
    end
  end
end

-- The archive is bounded in age and number; a task that falls out goes with its hash and the lock it holds.
if archived then
  local function drop(old)
    local gone = {}
    for _, id in ipairs(old) do
      local task = prefix .. id
      local lock = redis.pcall('HGET', task, 'unique_key')
      local holder = type(lock) == 'string' and lock ~= '' and redis.pcall('GET', lock)
      if not unreachable(lock) and not unreachable(holder) and not failed(redis.pcall('DEL', task)) then
        gone[#gone + 1] = id
        if holder == id then redis.call('DEL', lock) end
      end
    end
    variadic('ZREM', KEYS[5], gone)
  end
  drop(redis.call('ZRANGE', KEYS[5], '-inf', ARGV[3], 'BYSCORE', 'LIMIT', 0, 1000))
  local excess = redis.call('ZCARD', KEYS[5]) - tonumber(ARGV[4]) + 1
  if excess > 0 then drop(redis.call('ZRANGE', KEYS[5], 0, math.min(excess, 1000) - 1)) end
end
if first_retry and (#head == 0 or tonumber(head[2]) >= first_retry) then
  redis.pcall('PUBLISH', ARGV[6], ARGV[7])
end
return verdicts
