-- Admits a request if it passes all limits of all its counter sets. Takes from all counter sets or from none.
-- KEYS: calls, leases, means; then for each counter set: requests, tokens, reserve, slots, queue, budget, seconds.
-- ARGV: call id; info of the call ('' if it takes no slot); ms of the lease (0: only a preview, take nothing); prompt tokens
-- (-1: count no tokens); output tokens (-1: estimate them, by the mean of the model and what the limits leave beside the
-- prompt); model; mean of an unknown model; largest output; ms that it may wait for a slot; most calls in the queue; ms until
-- a slot is probably free; ms until a call probably ends; ms of backends that it will probably take; then for each counter
-- set: rpm, tpm, concurrent, day, month, seconds of backends a day, and a month (-1: no limit).
-- Answers {verdict: ok, refused, queued or seed (the counter set's budget is missing), tokens reserved, ms until it would pass
-- (-1: never), limit reached, number of its counter set, then for each counter set: requests and tokens used, ms until each is
-- zero again, tokens used of day and month, the slots that other calls hold, and ms of backends used of day and month}.
local id, info, lease_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])
local prompt, output, wait_ms = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[9])
-- Estimates: until a slot is free, and until a call ends and its tokens are counted.
local slot_ms, call_ms, seconds_ms = tonumber(ARGV[11]), tonumber(ARGV[12]), tonumber(ARGV[13])
local counter_sets = (#KEYS - 3) / 7
local answer = {'ok', 0, 0, '', 0}
local longest_ms, only_slots, has_waiters, full = 0, true, {}, {}

local function used_of(key)
    local head = redis.call('HMGET', key, 'n', 'o', 'l')
    if not head[1] then return 0, 0 end
    local sum, oldest, newest = tonumber(head[1]), tonumber(head[2]), tonumber(head[3])
    if newest < second - 60 then
        redis.call('DEL', key)
        return 0, 0
    end
    if oldest < second - 60 then
        local names = {}
        -- The window has not been read for a while, but calls have ended since and added to it.
        if second - oldest > 600 then
            for _, name in ipairs(redis.call('HKEYS', key)) do
                if tonumber(name) and tonumber(name) < second - 60 then names[#names + 1] = name end
            end
        else
            for s = oldest, second - 61 do names[#names + 1] = s end
        end
        if #names > 5000 then
            redis.call('DEL', key)
            return 0, 0
        end
        for _, count in ipairs(redis.call('HMGET', key, unpack(names))) do
            if count then sum = sum - tonumber(count) end
        end
        redis.call('HDEL', key, unpack(names))
        redis.call('HSET', key, 'n', sum, 'o', second - 60)
    end
    return sum, (newest + 61) * 1000 - now
end

-- Ms until so many have left the window; nil if it does not hold so many.
local function until_gone(key, count)
    local oldest = tonumber(redis.call('HGET', key, 'o') or second)
    local names = {}
    for s = oldest, second do names[#names + 1] = s end
    for n, found in ipairs(redis.call('HMGET', key, unpack(names))) do
        if found then count = count - tonumber(found) end
        if count <= 0 then return (names[n] + 61) * 1000 - now end
    end
    return nil
end

local function refuse(limit, counter_set, ms)
    if limit ~= 'concurrent' then only_slots = false end
    if answer[1] == 'ok' or (longest_ms >= 0 and (ms < 0 or ms > longest_ms)) then
        answer[1], answer[4], answer[5], longest_ms = 'refused', limit, counter_set, ms
    end
end

local function ms_to_next_month()
    local day = today
    repeat day = day + 1 until month_of(day) ~= month_of(today)
    return (day * 86400 - second) * 1000
end

local need = 0
if prompt >= 0 then
    if output < 0 then
        output = math.min(math.floor(tonumber(redis.call('HGET', KEYS[3], ARGV[6]) or ARGV[7]) + 0.5), tonumber(ARGV[8]))
        -- An estimate alone must not refuse a request whose prompt fits.
        for i = 1, counter_sets do
            for _, n in ipairs({2, 4, 5}) do
                local limit = tonumber(ARGV[13 + (i - 1) * 7 + n])
                if limit >= 0 then output = math.min(output, limit - prompt) end
            end
        end
        output = math.max(output, 0)
    end
    need = prompt + output
end

for i = 1, counter_sets do
    local k, a = 3 + (i - 1) * 7, 13 + (i - 1) * 7
    local requests, tokens, reserve, slots, queue, budget = KEYS[k + 1], KEYS[k + 2], KEYS[k + 3], KEYS[k + 4], KEYS[k + 5], KEYS[k + 6]
    local rpm, tpm, concurrent = tonumber(ARGV[a + 1]), tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3])
    local day, month = tonumber(ARGV[a + 4]), tonumber(ARGV[a + 5])
    local requests_used, requests_reset, tokens_used, tokens_reset, day_used, month_used = 0, 0, 0, 0, 0, 0
    local slots_used, day_ms, month_ms = 0, 0, 0
    if rpm >= 0 then
        requests_used, requests_reset = used_of(requests)
        if rpm == 0 then
            refuse('rpm', i, -1)
        elseif requests_used + 1 > rpm then
            refuse('rpm', i, until_gone(requests, requests_used + 1 - rpm) or 61000)
        end
    end
    local reserved = 0
    if tpm >= 0 or day >= 0 or month >= 0 then
        reserved = tonumber(redis.call('GET', reserve) or 0)
        if reserved ~= 0 and redis.call('ZCOUNT', slots, '(' .. now, '+inf') == 0 then
            -- No call is left that could release it.
            redis.call('DEL', reserve)
            reserved = 0
        end
    end
    if tpm >= 0 then
        tokens_used, tokens_reset = used_of(tokens)
        if prompt >= 0 then
            local excess = tokens_used + reserved + need - tpm
            if need > tpm or tpm == 0 then
                refuse('tpm', i, -1)
            elseif excess > 0 then
                refuse('tpm', i, until_gone(tokens, excess) or call_ms)
            end
        end
        tokens_used = tokens_used + reserved
        if reserved > 0 then tokens_reset = 61000 - now % 1000 end
    end
    if day >= 0 or month >= 0 then
        if redis.call('EXISTS', budget) == 0 then
            return {'seed', 0, 0, '', i}
        end
        local found = redis.call('HMGET', budget, 'd' .. today, 'm' .. month_of(today))
        day_used, month_used = tonumber(found[1] or 0), tonumber(found[2] or 0)
        if not found[1] then
            redis.call('HDEL', budget, 'd' .. (today - 1), 'd' .. (today - 2), 'd' .. (today - 3))
        end
        if prompt >= 0 then
            if day >= 0 and (need > day or day == 0) then
                refuse('day', i, -1)
            elseif day >= 0 and day_used + reserved + need > day then
                refuse('day', i, day_used + need > day and ((today + 1) * 86400 - second) * 1000 or call_ms)
            end
            if month >= 0 and (need > month or month == 0) then
                refuse('month', i, -1)
            elseif month >= 0 and month_used + reserved + need > month then
                refuse('month', i, month_used + need > month and ms_to_next_month() or call_ms)
            end
        end
    end
    local day_s, month_s = tonumber(ARGV[a + 6]), tonumber(ARGV[a + 7])
    if day_s >= 0 or month_s >= 0 then
        local seconds = KEYS[k + 7]
        if redis.call('EXISTS', seconds) == 0 then
            return {'seed', 0, 0, '', i}
        end
        local found = redis.call('HMGET', seconds, 'd' .. today, 'm' .. month_of(today), 'r')
        day_ms, month_ms = tonumber(found[1] or 0), tonumber(found[2] or 0)
        local held = tonumber(found[3] or 0)
        if not found[1] then
            redis.call('HDEL', seconds, 'd' .. (today - 1), 'd' .. (today - 2), 'd' .. (today - 3))
        end
        if held ~= 0 and redis.call('ZCOUNT', slots, '(' .. now, '+inf') == 0 then
            -- No call is left that could release it.
            redis.call('HDEL', seconds, 'r')
            held = 0
        end
        if info ~= '' then
            -- How long it takes is not known: it passes if anything is left.
            if day_s == 0 then
                refuse('day_seconds', i, -1)
            elseif day_s > 0 and day_ms + held >= day_s * 1000 then
                refuse('day_seconds', i, day_ms >= day_s * 1000 and ((today + 1) * 86400 - second) * 1000 or call_ms)
            end
            if month_s == 0 then
                refuse('month_seconds', i, -1)
            elseif month_s > 0 and month_ms + held >= month_s * 1000 then
                refuse('month_seconds', i, month_ms >= month_s * 1000 and ms_to_next_month() or call_ms)
            end
        end
    end
    if info ~= '' and concurrent == 0 then
        refuse('concurrent', i, -1)
    elseif info ~= '' and concurrent > 0 then
        local ahead = redis.call('ZCARD', queue)
        has_waiters[i] = ahead > 0
        if ahead > 0 then
            redis.call('ZREMRANGEBYSCORE', queue, '-inf', now)
            ahead = redis.call('ZRANK', queue, id) or redis.call('ZCARD', queue)
        end
        slots_used = redis.call('ZCOUNT', slots, '(' .. now, '(' .. PAUSED_TEXT)
        if slots_used + ahead >= concurrent then
            full[i] = true
            refuse('concurrent', i, slot_ms)
        end
    end
    local o = 5 + (i - 1) * 9
    answer[o + 1], answer[o + 2], answer[o + 3], answer[o + 4] = requests_used, tokens_used, requests_reset, tokens_reset
    answer[o + 5], answer[o + 6], answer[o + 7] = day_used, month_used, slots_used
    answer[o + 8], answer[o + 9] = day_ms, month_ms
end

if answer[1] == 'refused' and lease_ms > 0 and info ~= '' then
    local stored = redis.call('HGET', KEYS[1], id)
    if stored and string.sub(stored, 1, #QUEUED) ~= QUEUED then
        -- It has been admitted, but its process has not got the answer.
        answer[1], answer[2], answer[4], answer[5] = 'ok', tonumber(string.match(stored, '^%d+') or 0), '', 0
        return answer
    end
end
if answer[1] == 'refused' then
    answer[3] = longest_ms
    local may_wait = only_slots and longest_ms >= 0 and wait_ms > 0
    for i = 1, counter_sets do
        local queue, concurrent = KEYS[3 + (i - 1) * 7 + 5], tonumber(ARGV[13 + (i - 1) * 7 + 3])
        if may_wait and concurrent > 0 then
            local is_in = redis.call('ZSCORE', queue, id)
            may_wait = is_in or redis.call('ZCARD', queue) < tonumber(ARGV[10])
        end
    end
    for i = 1, counter_sets do
        local queue, concurrent = KEYS[3 + (i - 1) * 7 + 5], tonumber(ARGV[13 + (i - 1) * 7 + 3])
        -- Only where slots are missing: a place in another queue would delay others for nothing.
        if may_wait and full[i] then
            -- The score is when the wait ends. All wait equally long, so it is the order of arrival, too.
            redis.call('ZADD', queue, 'NX', now + wait_ms, id)
            redis.call('PEXPIRE', queue, wait_ms + 60000)
        elseif concurrent > 0 then
            redis.call('ZREM', queue, id)
        end
    end
    if may_wait then
        answer[1] = 'queued'
        -- So that the audit has it if its process dies.
        redis.call('ZADD', KEYS[2], now + lease_ms, id)
        redis.call('HSET', KEYS[1], id, QUEUED .. ' ' .. info)
    end
    return answer
end

answer[2] = need
if lease_ms == 0 then return answer end
for i = 1, counter_sets do
    local k, a, o = 3 + (i - 1) * 7, 13 + (i - 1) * 7, 5 + (i - 1) * 9
    if tonumber(ARGV[a + 1]) >= 0 then
        add_to(KEYS[k + 1], 1)
        answer[o + 1], answer[o + 3] = answer[o + 1] + 1, 61000 - now % 1000
    end
    answer[o + 2] = answer[o + 2] + need
    if info ~= '' then
        redis.call('ZADD', KEYS[k + 4], now + lease_ms, id)
        if need > 0 then redis.call('INCRBY', KEYS[k + 3], need) end
        if has_waiters[i] then redis.call('ZREM', KEYS[k + 5], id) end
        if seconds_ms > 0 and (tonumber(ARGV[a + 6]) >= 0 or tonumber(ARGV[a + 7]) >= 0) then
            redis.call('HINCRBY', KEYS[k + 7], 'r', seconds_ms)
        end
    end
end
if info ~= '' then
    redis.call('ZADD', KEYS[2], now + lease_ms, id)
    redis.call('HSET', KEYS[1], id, need .. ' ' .. info)
end
return answer
