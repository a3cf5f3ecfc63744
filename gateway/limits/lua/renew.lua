-- Long calls keep their leases, and have them again where Redis has lost them.
-- KEYS: leases; then slots of one scope of one call each.
-- ARGV: lease in ms; then the call's id for each of the slots.
for i = 2, #ARGV do
    redis.call('ZADD', KEYS[1], 'XX', now + tonumber(ARGV[1]), ARGV[i])
    redis.call('ZADD', KEYS[i], now + tonumber(ARGV[1]), ARGV[i])
end
return #ARGV - 1
