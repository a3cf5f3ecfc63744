-- Calls whose lease has ended some time ago: whoever ran them is gone.
-- KEYS: leases, calls. ARGV: ms since the lease's end; how many at most.
-- Answers ids and what was remembered of them, in turn.
local ids = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - tonumber(ARGV[1]), 'LIMIT', 0, ARGV[2])
local found = {}
for _, id in ipairs(ids) do
    local info = redis.call('HGET', KEYS[2], id)
    if info then
        found[#found + 1] = id
        found[#found + 1] = info
    else
        redis.call('ZREM', KEYS[1], id)
    end
end
return found
