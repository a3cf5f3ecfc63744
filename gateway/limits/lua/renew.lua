-- Renews the leases of running calls; a slot that Redis has lost is occupied again.
-- KEYS: leases; then, for each counter set of each call: slots.
-- ARGV: ms of the lease; then, for each slot: call id.
for i = 2, #ARGV do
    redis.call('ZADD', KEYS[1], 'XX', now + tonumber(ARGV[1]), ARGV[i])
    local is_paused = tonumber(redis.call('ZSCORE', KEYS[i], ARGV[i]) or 0) > PAUSED
    redis.call('ZADD', KEYS[i], (is_paused and PAUSED or 0) + now + tonumber(ARGV[1]), ARGV[i])
end
return #ARGV - 1
