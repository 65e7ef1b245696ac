-- Shared by the scripts that meet keys which the caller could not name (design: docs/architecture.md, "Scripts").
--
-- While a slot moves, such a key may have left this node: the look then answers an error, and the id stays untouched.
-- A key of another type is damage, not a move.
-- Invariant: a script does not touch a key any more that it has made vanish. While a slot is open, Redis takes a key that is
-- not there for one that has moved, and ends the script in the middle, even if the script itself has just emptied it.
local function unreachable(reply)
  return type(reply) == 'table' and reply.err ~= nil and not string.find(reply.err, 'WRONGTYPE', 1, true)
end
local function failed(reply)
  return type(reply) == 'table' and reply.err ~= nil
end
-- `redis.call(command, key, ...)` with any number of values, in slices: Lua's stack ends at some 8,000.
local function variadic(command, key, values)
  for first = 1, #values, 1000 do
    redis.call(command, key, unpack(values, first, math.min(first + 999, #values)))
  end
end
