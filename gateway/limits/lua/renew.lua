-- Renews the leases of running calls; what Redis has lost or missed of their slots is as their process has it again.
-- KEYS: leases; then, for each counter set of each call: slots.
-- ARGV: ms of the lease; then, for each slot: call id, 1 if the call has given it up.
local ends = now + tonumber(ARGV[1])
for i = 2, #KEYS do
    local call, is_paused = ARGV[2 * i - 2], ARGV[2 * i - 1] == '1'
    redis.call('ZADD', KEYS[1], 'XX', ends, call)
    redis.call('ZADD', KEYS[i], is_paused and PAUSED + ends or ends, call)
end
return #KEYS - 1
