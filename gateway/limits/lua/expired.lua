-- Finds calls whose lease has expired: their process has died.
-- KEYS: leases, calls.
-- ARGV: ms since the end of the lease; the most calls to find.
-- Answers for each call its id and its info.
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
