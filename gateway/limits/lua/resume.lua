-- Takes the slots again that a call has given up, all or none.
-- KEYS: for each counter set: slots, queue.
-- ARGV: call id; ms of the lease; then for each counter set: requests at once (-1: no limit).
-- Answers 1 if it has them.
for i = 1, #KEYS, 2 do
    local concurrent, score = tonumber(ARGV[2 + (i + 1) / 2]), tonumber(redis.call('ZSCORE', KEYS[i], ARGV[1]) or 0)
    local has_slot = score > now and score < PAUSED
    local others = redis.call('ZCOUNT', KEYS[i], '(' .. now, '(' .. PAUSED_TEXT)
    if concurrent >= 0 and not has_slot and others >= concurrent then return 0 end
end
for i = 1, #KEYS, 2 do redis.call('ZADD', KEYS[i], now + tonumber(ARGV[2]), ARGV[1]) end
return 1
