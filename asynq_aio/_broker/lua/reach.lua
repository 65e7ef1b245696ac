-- reach.lua: would a claim get through? While the slot moves, Redis refuses a script whose keys are not all on one node.
--
-- KEYS   those of claim.lua
-- Returns 0. It changes nothing, but counts as a write: a node that takes none, for want of replicas or disk, refuses it.
return redis.call('PERSIST', KEYS[1])
