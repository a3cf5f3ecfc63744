-- The queue: calls that wait get slots in their order.

-- How many of the calls that wait are looked at, in one group and in all; of many groups, fewer of each.
local MOST_OF_GROUP, MOST, LEAST_OF_GROUP = 24, 64, 4
-- A client may have so many times as much in the queue of a group as that has room left, so that others find room.
local MOST_OF_ROOM = 3

-- A batch leaves the last free slot to others.
local function keeps_back(call)
    if call.batch == 0 or call.mode == 'order' then return false end
    local slots, free = 0, 0
    for _, c in ipairs(call.cands) do
        if not c.swaps or has(box_of(c.b), c.m) then
            slots = slots + c.slots
            for _, ends in ipairs(row_of(c)) do free = free + (ends == 0 and 1 or 0) end
        end
    end
    return slots > 1 and free == 1
end

local function begin_load(call, e)
    local c, name = e.c, F .. 'box:' .. e.c.b
    local box, ends = box_of(c.b), now + c.load_ms + e.block
    local names = {}
    if #(e.victims or victims_of(box, c)).names > 0 then
        -- Which ones go is for the backend to decide.
        for m in pairs(box.residents) do names[#names + 1] = m end
    end
    box.loading, box.evicts = {m = c.m, id = call.id, began = now, ends = ends}, {}
    redis.call('HSET', name, 'loading', table.concat({c.m, call.id, now, math.floor(ends)}, ' '))
    redis.call('HDEL', name, 'evicts', 'settles')
    if #names > 0 then redis.call('HSET', name, 'evicts', table.concat(names, FS)) end
    for _, m in ipairs(names) do box.evicts[m] = true end
    if redis.call('EXISTS', F .. 'size:' .. call.group) == 1 then
        redis.call('HSET', F .. 'size:' .. call.group, 'since', now)
    end
end

local function note_use(c, resident)
    resident.used = now
    local name, field = F .. 'box:' .. c.b, 'r:' .. c.m
    local kept = redis.call('HGET', name, field)
    if kept then redis.call('HSET', name, field, (string.gsub(kept, '^(%S+ %S+) %S+', '%1 ' .. string.format('%d', now)))) end
end

-- Gives a call a slot of the chosen place. `waited`: it was counted while it waited.
local function grant(call, e, waited)
    local c, place = e.c, place_of(e.c)
    local cost = math.floor((e.why == 'load' and c.load_ms or 0) + e.prefill + c.service_ms)
    local charged = charge_at_begin(call, cost)
    charge_served(call, charged / call.weight, waited and 0 or 1)
    local ends = now + e.load + e.block + e.prefill + c.service_ms
    redis.call('ZADD', F .. 'ends:' .. place, ends, call.id)
    redis.call('HSET', F .. 'calls:' .. call.pid, call.id,
        joined('r', c.b, c.m, call.group, call.client, call.sub, call.weight, cost, now, e.why, e.cached, charged))
    if rows[place] then occupy(rows[place], ends) end
    if call.mode == 'order' then return end
    if call.mode == 'fast' then
        redis.call('ZREMRANGEBYSCORE', F .. 'firsts:' .. c.b, '-inf', now)
        redis.call('ZADD', F .. 'firsts:' .. c.b, now + e.t, call.id)
        table.insert(firsts_of(c.b), now + e.t)
        remember(call, c)
    end
    if not c.swaps then return end
    local box = box_of(c.b)
    box.victims = {}
    if box.residents[c.m] then
        note_use(c, box.residents[c.m])
    elseif not box.loading then
        begin_load(call, e)
    end
end

-- Adds a call to the size of the queue, or takes it off: of all, and of its client. Returns how many wait.
local function count_in_queue(call, one)
    local size = F .. 'size:' .. call.group
    redis.call('HINCRBY', size, 't', one * call.prompt)
    redis.call('HINCRBY', size, 't:' .. call.client, one * call.prompt)
    if redis.call('HINCRBY', size, 'n:' .. call.client, one) <= 0 then
        redis.call('HDEL', size, 'n:' .. call.client, 't:' .. call.client)
    end
    return redis.call('HINCRBY', size, 'n', one)
end

-- Whether there is room for one more call of its client, which leaves some to others.
local function has_room(call, n, t, most_calls, most_tokens)
    if n >= most_calls or (n > 0 and t + call.prompt > most_tokens) then return false end
    local size = redis.call('HMGET', F .. 'size:' .. call.group, 'n:' .. call.client, 't:' .. call.client)
    local own, own_tokens = tonumber(size[1] or 0), tonumber(size[2] or 0)
    if own == 0 then return true end
    return own < MOST_OF_ROOM * (most_calls - n) and own_tokens + call.prompt <= MOST_OF_ROOM * (most_tokens - t)
end

local function join_queue(call)
    charge_both(call.group, call.client, call.sub, 0, 1)
    local size = F .. 'size:' .. call.group
    redis.call('HSET', F .. 'queue:' .. call.group, call.id, cmsgpack.pack(call))
    redis.call('HSETNX', size, 'since', now)
    count_in_queue(call, 1)
    redis.call('SADD', F .. 'groups', call.group)
    redis.call('HSET', F .. 'calls:' .. call.pid, call.id, joined('w', call.group))
    redis.call('ZADD', F .. 'line:' .. call.group .. ':' .. line_of(call), call.arrived, call.id)
    redis.call('HINCRBY', F .. 'lines:' .. call.group, line_of(call), 1)
end

-- Returns the call, nil if it does not wait.
local function leave_queue(group, id)
    local packed = redis.call('HGET', F .. 'queue:' .. group, id)
    if not packed then return nil end
    local call = cmsgpack.unpack(packed)
    redis.call('HDEL', F .. 'queue:' .. group, id)
    local line = line_of(call)
    redis.call('ZREM', F .. 'line:' .. group .. ':' .. line, id)
    if redis.call('HINCRBY', F .. 'lines:' .. group, line, -1) <= 0 then redis.call('HDEL', F .. 'lines:' .. group, line) end
    if count_in_queue(call, -1) <= 0 then
        redis.call('DEL', F .. 'size:' .. group)
        redis.call('SREM', F .. 'groups', group)
    end
    return call
end

-- A backend is cleared for a model that is nowhere and has waited longest: what has to go for it gets no new calls there.
local function clear_for(e)
    local box = box_of(e.c.b)
    if box.want and box.want ~= e.c.m then return end
    box.want, box.blocked_ms = e.c.m, e.block + e.load
    if e.victims and e.victims.stays <= now then
        for _, m in ipairs(e.victims.names) do box.blocked[m] = true end
    end
end

local function forget_wants(groups)
    for _, calls in ipairs(groups) do
        for _, c in ipairs(calls[1].cands) do
            local box = c.swaps and box_of(c.b)
            if box then box.want_before, box.want = box.want_before or box.want, nil end
        end
    end
end

local function keep_wants()
    for name, box in pairs(boxes) do
        if box.want and box.want ~= box.want_before then
            redis.call('HSET', F .. 'box:' .. name, 'want', box.want)
        elseif box.want_before and not box.want then
            redis.call('HDEL', F .. 'box:' .. name, 'want')
        end
    end
end

local function has_free_slot(call)
    for _, c in ipairs(call.cands) do
        if running_in(place_of(c)) < c.slots then return true end
    end
    return false
end

-- The groups in which calls wait, `first` first: the others begin with another one each time, so that each has its turn.
local function groups_in_turn(first, newcomer)
    local names, turned = redis.call('SMEMBERS', F .. 'groups'), {}
    if newcomer and redis.call('SISMEMBER', F .. 'groups', first) == 0 then names[#names + 1] = first end
    table.sort(names)
    for i = 1, #names do
        local name = names[(now + i) % #names + 1]
        if name == first then table.insert(turned, 1, name) else turned[#turned + 1] = name end
    end
    return turned
end

-- One of the calls of a group, if there are others to look at first and it finds no free slot.
local function one_in_vain(group)
    local id = redis.call('HRANDFIELD', F .. 'queue:' .. group)
    local call = id and cmsgpack.unpack(redis.call('HGET', F .. 'queue:' .. group, id))
    return call and not has_free_slot(call) and call or nil
end

-- The calls that wait by group, the group that has waited longest first: of `first` the first ones, of others as many as there is
-- time for, and one if they find no free slot. `newcomer` is a call of `first` that is not in the queue.
local function waiting_groups(first, newcomer)
    local groups, left, names = {}, MOST, groups_in_turn(first, newcomer)
    for i, group in ipairs(names) do
        if left <= 0 then break end
        local one = group ~= first and one_in_vain(group)
        local share = math.max(LEAST_OF_GROUP, math.floor(left / (#names - i + 1)))
        if group == first then share = MOST_OF_GROUP end
        local calls = one and {one} or in_order(group, math.min(MOST_OF_GROUP, share), group == first and newcomer or nil)
        left = left - #calls
        if #calls > 0 then groups[#groups + 1] = calls end
        calls.oldest = NEVER * 10
        for _, call in ipairs(calls) do
            for _, c in ipairs(call.cands) do awaited[c.m] = true end
            calls.oldest = math.min(calls.oldest, call.arrived)
        end
    end
    table.sort(groups, function(x, y)
        if x.oldest ~= y.oldest then return x.oldest < y.oldest end
        return x[1].group < y[1].group
    end)
    return groups
end

local function hand_over(call, e)
    leave_queue(call.group, call.id)
    grant(call, e, true)
    redis.call('PUBLISH', KEYS[1] .. ':granted:' .. call.pid, joined(call.id, e.c.b, e.c.m, e.why, math.floor(e.prefill + e.c.service_ms), e.cached))
end

-- A call that goes on waiting has what it will probably get.
local function wait_on(call, e)
    if call.mode == 'fast' and e.why == 'load' and is_nowhere(call) then clear_for(e) end
    local row = row_of(e.c)
    if #row > 0 then occupy(row, math.max(now + e.load + e.block, row[1]) + e.prefill + e.c.service_ms) end
end

-- Gives slots to calls that wait. Returns by call its place in the queue, ms until its first token, and whether it got a slot;
-- of all calls of `group`, of others as far as there are free slots.
local function dispatch(group)
    local outcomes, groups = {}, waiting_groups(group)
    forget_wants(groups)
    for _, calls in ipairs(groups) do
        local position = 0
        for _, call in ipairs(calls) do
            if call.group ~= group and not has_free_slot(call) then break end
            local _, e = evaluate(call)
            local outcome = {ms = e.t - e.evict, e = e}
            outcomes[call.id] = outcome
            if e.can and not keeps_back(call) then
                outcome.granted = true
                hand_over(call, e)
            else
                position = position + 1
                outcome.position = position
                wait_on(call, e)
            end
        end
    end
    keep_wants()
    return outcomes
end

local function end_load(name, began)
    if redis.call('HEXISTS', name, 'evicts') == 1 then redis.call('HSET', name, 'settles', began .. ' ' .. now) end
    redis.call('HDEL', name, 'loading')
end

-- What a call that was loading leaves: who joined goes on loading it.
local function pass_on_load(b, m, id)
    local name = F .. 'box:' .. b
    local loading, by, began, ends = string.match(redis.call('HGET', name, 'loading') or '', LOADING)
    if by ~= id then return end
    local heir = loading == m and redis.call('ZRANGE', F .. 'ends:' .. b .. FS .. m, 0, 0)[1]
    if heir then
        redis.call('HSET', name, 'loading', table.concat({m, heir, began, ends}, ' '))
    else
        end_load(name, began)
    end
end

-- Frees what a call holds, or its place in the queue. `real` is what it has cost in ms, -1 for what was expected. Returns its
-- group, nil if the call is not known.
local function free(pid, id, real)
    local text = redis.call('HGET', F .. 'calls:' .. pid, id)
    if not text then return nil end
    redis.call('HDEL', F .. 'calls:' .. pid, id)
    local r = words(text)
    if r[1] == 'w' then
        local call = leave_queue(r[2], id)
        if call then charge_both(call.group, call.client, call.sub, 0, -1) end
        return r[2]
    end
    local b, m = r[2], r[3]
    redis.call('ZREM', F .. 'ends:' .. b .. FS .. m, id)
    redis.call('ZREM', F .. 'firsts:' .. b, id)
    local charged = tonumber(r[12]) or 0
    if real < 0 then real = charged else note_cost(r[4], real) end
    charge_both(r[4], r[5], r[6], (real - charged) / tonumber(r[7]), -1)
    pass_on_load(b, m, id)
    return r[4]
end

local function free_all(pid)
    for _, id in ipairs(redis.call('HKEYS', F .. 'calls:' .. pid)) do free(pid, id, -1) end
    redis.call('ZREM', F .. 'processes', pid)
end

-- A call as its process describes it: 20 values, names of prefixes with their tokens, then 9 values for each candidate.
local function read_call(a)
    local call = {
        mode = a[2], pid = a[3], id = a[4], group = a[5], client = a[6], sub = a[7], weight = tonumber(a[8]),
        batch = tonumber(a[9]), patience = tonumber(a[10]), prompt = tonumber(a[13]), spill = tonumber(a[14]),
        sticky = tonumber(a[15]), arrived = tonumber(a[16]), full = a[17], shared = a[18], shared_tokens = tonumber(a[19]),
        prefixes = {}, cands = {},
    }
    call.name = call.sub == '' and call.client or call.client .. '/' .. call.sub
    if call.arrived == 0 then call.arrived = now end
    local at = 21
    for _ = 1, tonumber(a[20]) do
        call.prefixes[#call.prefixes + 1] = a[at]
        call.prefixes[#call.prefixes + 1] = tonumber(a[at + 1])
        at = at + 2
    end
    while a[at] do
        call.cands[#call.cands + 1] = {
            b = a[at], m = a[at + 1], tier = tonumber(a[at + 2]), slots = tonumber(a[at + 3]), swaps = a[at + 4] == '1',
            size = tonumber(a[at + 5]), load_ms = tonumber(a[at + 6]), prefill_us = tonumber(a[at + 7]),
            service_ms = tonumber(a[at + 8]),
        }
        at = at + 9
    end
    return call
end

local function slots_of(call)
    local slots = 0
    for _, c in ipairs(call.cands) do slots = slots + c.slots end
    return math.max(1, slots)
end
