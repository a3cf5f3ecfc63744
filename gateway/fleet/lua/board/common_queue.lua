-- The queue: calls that wait get slots in the order of the least virtual time, and what they cost is charged to their client.

-- How many of the calls that wait are looked at, in one group and in all.
local MOST_OF_GROUP, MOST = 24, 64
-- The most that a call is charged when it begins, in means of its group.
local MOST_MEANS = 2

-- A virtual time, how many calls of that name run or wait, and the virtual time of all, from which one that was idle begins.
local function time_of(group, name, of_all)
    local found = redis.call('HMGET', F .. 'fair:' .. group, of_all, name)
    local general, v, n = tonumber(found[1] or 0), 0, 0
    if found[2] then
        local parts = words(found[2])
        v, n = tonumber(parts[1]), tonumber(parts[2])
    end
    if n <= 0 then v, n = math.max(v, general), 0 end
    return v, n, general
end

-- Adds to a virtual time, and to how many calls run or wait.
local function charge(group, name, of_all, cost, count)
    local start, n, general = time_of(group, name, of_all)
    local v = start + cost
    n = math.max(0, n + count)
    if n == 0 and v <= general then
        redis.call('HDEL', F .. 'fair:' .. group, name)
    else
        redis.call('HSET', F .. 'fair:' .. group, name, joined(string.format('%.1f', v), n))
    end
    return start, general
end

local function charge_both(group, client, sub, cost, count)
    charge(group, client, '*', cost, count)
    if sub ~= '' then charge(group, client .. '/' .. sub, client .. '/*', cost, count) end
end

-- What a call is charged when it begins: what it will probably cost, but not much more than calls of its group have cost; the
-- rest when it ends. So a wrong estimate changes the order of others little.
local function charge_at_begin(call, cost)
    local mean = tonumber(redis.call('HGET', F .. 'fair:' .. call.group, '~') or 0)
    return math.min(cost, MOST_MEANS * mean)
end

local function note_cost(group, real)
    local fair = F .. 'fair:' .. group
    local mean = redis.call('HGET', fair, '~')
    redis.call('HSET', fair, '~', string.format('%.1f', mean and tonumber(mean) * 0.9 + real * 0.1 or real))
end

-- The virtual time of all is that of the call that was served last.
local function charge_served(call, cost, count)
    local start, general = charge(call.group, call.client, '*', cost, count)
    local fair = F .. 'fair:' .. call.group
    if start > general then redis.call('HSET', fair, '*', string.format('%.1f', start)) end
    if call.sub ~= '' then
        start, general = charge(call.group, call.name, call.client .. '/*', cost, count)
        if start > general then redis.call('HSET', fair, call.client .. '/*', string.format('%.1f', start)) end
    end
end

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
    redis.call('HDEL', name, 'evicts')
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
    if box.residents[c.m] then
        note_use(c, box.residents[c.m])
    elseif not box.loading then
        begin_load(call, e)
    end
end

local function next_in(group, line)
    local ids = redis.call('ZRANGE', F .. 'line:' .. group .. ':' .. line.name, line.next, line.next)
    line.next = line.next + 1
    local packed = ids[1] and redis.call('HGET', F .. 'queue:' .. group, ids[1])
    local call = packed and cmsgpack.unpack(packed) or nil
    if not call then call, line.newcomer = line.newcomer, nil end
    line.call = call
    -- A batch that has waited for half of its time yields no more.
    if call then line.band = (call.batch == 1 and now - call.arrived < call.patience / 2) and 1 or 0 end
    return call
end

-- By band, by the virtual time of the client, by that of its user, by arrival.
local function precedes(x, y)
    if x.band ~= y.band then return x.band < y.band end
    if x.client.v ~= y.client.v then return x.client.v < y.client.v end
    if x.v ~= y.v then return x.v < y.v end
    if x.call.arrived ~= y.call.arrived then return x.call.arrived < y.call.arrived end
    return x.call.id < y.call.id
end

-- The last of its line is a call of the group that is not in the queue.
local function add_newcomer(lines, call)
    local own, client
    for _, line in ipairs(lines) do
        if line.name == call.name then own = line end
        if line.owner == call.client then client = line.client end
    end
    if not own then
        own = {name = call.name, next = 0, client = client or {}}
        lines[#lines + 1] = own
    end
    own.newcomer = call
    own.client.v = time_of(call.group, call.client, '*')
    own.v = own.client.v
    if call.sub ~= '' then own.v = time_of(call.group, call.name, call.client .. '/*') end
end

-- The lines of a group with their first calls; of many lines those of the clients with the least virtual times.
local function lines_of(group, most, newcomer)
    local names, lines, clients = redis.call('HKEYS', F .. 'lines:' .. group), {}, {}
    for i = 1, #names, 500 do
        local asked = {}
        for k = i, math.min(i + 499, #names) do
            asked[#asked + 1] = names[k]
            asked[#asked + 1] = string.match(names[k], '^[^/]*')
        end
        local found = redis.call('HMGET', F .. 'fair:' .. group, unpack(asked))
        for k = 1, #asked, 2 do
            local name, owner = asked[k], asked[k + 1]
            clients[owner] = clients[owner] or {v = found[k + 1] and tonumber(words(found[k + 1])[1]) or 0}
            local v = found[k] and tonumber(words(found[k])[1]) or 0
            lines[#lines + 1] = {name = name, owner = owner, next = 0, v = v, client = clients[owner]}
        end
    end
    if newcomer then add_newcomer(lines, newcomer) end
    if #lines > most then
        table.sort(lines, function(x, y)
            if x.client.v ~= y.client.v then return x.client.v < y.client.v end
            return x.name < y.name
        end)
    end
    local heads = {}
    for i = 1, math.min(#lines, most) do
        if next_in(group, lines[i]) then heads[#heads + 1] = lines[i] end
    end
    return heads
end

-- The calls in line in a group in the order in which they are served.
local function in_order(group, most, newcomer)
    local heads, found = lines_of(group, 2 * most, newcomer), {}
    while #heads > 0 and #found < most do
        local first = 1
        for i = 2, #heads do
            if precedes(heads[i], heads[first]) then first = i end
        end
        local line = heads[first]
        local call = line.call
        found[#found + 1] = call
        local cost = (call.prompt * call.cands[1].prefill_us / 1000 + call.cands[1].service_ms) / call.weight
        line.client.v = line.client.v + cost
        if call.sub ~= '' then line.v = line.v + cost end
        if not next_in(group, line) then table.remove(heads, first) end
    end
    return found
end

local function join_queue(call)
    charge_both(call.group, call.client, call.sub, 0, 1)
    local size = F .. 'size:' .. call.group
    redis.call('HSET', F .. 'queue:' .. call.group, call.id, cmsgpack.pack(call))
    redis.call('HSETNX', size, 'since', now)
    redis.call('HINCRBY', size, 'n', 1)
    redis.call('HINCRBY', size, 't', call.prompt)
    redis.call('SADD', F .. 'groups', call.group)
    redis.call('HSET', F .. 'calls:' .. call.pid, call.id, joined('w', call.group))
    redis.call('ZADD', F .. 'line:' .. call.group .. ':' .. call.name, call.arrived, call.id)
    redis.call('HINCRBY', F .. 'lines:' .. call.group, call.name, 1)
end

-- Returns the call, nil if it does not wait.
local function leave_queue(group, id)
    local packed = redis.call('HGET', F .. 'queue:' .. group, id)
    if not packed then return nil end
    local call = cmsgpack.unpack(packed)
    redis.call('HDEL', F .. 'queue:' .. group, id)
    redis.call('ZREM', F .. 'line:' .. group .. ':' .. call.name, id)
    if redis.call('HINCRBY', F .. 'lines:' .. group, call.name, -1) <= 0 then
        redis.call('HDEL', F .. 'lines:' .. group, call.name)
    end
    redis.call('HINCRBY', F .. 'size:' .. group, 't', -call.prompt)
    if redis.call('HINCRBY', F .. 'size:' .. group, 'n', -1) <= 0 then
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

-- The calls that wait by group, the group that has waited longest first.
local function waiting_groups(newcomer)
    local groups, left, names = {}, MOST, redis.call('SMEMBERS', F .. 'groups')
    if newcomer and redis.call('SISMEMBER', F .. 'groups', newcomer.group) == 0 then names[#names + 1] = newcomer.group end
    for _, group in ipairs(names) do
        local its_own = newcomer and newcomer.group == group and newcomer or nil
        local calls = in_order(group, math.min(MOST_OF_GROUP, left), its_own)
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

local function has_free_slot(call)
    for _, c in ipairs(call.cands) do
        if running_in(place_of(c)) < c.slots then return true end
    end
    return false
end

-- Gives slots to calls that wait. Returns by call its place in the queue, ms until its first token, and whether it got a slot;
-- of all calls of `group`, of others as far as there are free slots.
local function dispatch(group)
    local outcomes, groups = {}, waiting_groups()
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

-- What a call that was loading leaves: who joined goes on loading it.
local function pass_on_load(b, m, id)
    local name = F .. 'box:' .. b
    local loading, by, began, ends = string.match(redis.call('HGET', name, 'loading') or '', LOADING)
    if by ~= id then return end
    local heir = loading == m and redis.call('ZRANGE', F .. 'ends:' .. b .. FS .. m, 0, 0)[1]
    if heir then
        redis.call('HSET', name, 'loading', table.concat({m, heir, began, ends}, ' '))
    else
        redis.call('HDEL', name, 'loading', 'evicts')
    end
end

-- Frees what a call holds, or its place in the queue. `real` is what it has cost in ms, -1 for what was expected.
local function free(pid, id, real)
    local text = redis.call('HGET', F .. 'calls:' .. pid, id)
    if not text then return false end
    redis.call('HDEL', F .. 'calls:' .. pid, id)
    local r = words(text)
    if r[1] == 'w' then
        local call = leave_queue(r[2], id)
        if call then charge_both(call.group, call.client, call.sub, 0, -1) end
        return true
    end
    local b, m = r[2], r[3]
    redis.call('ZREM', F .. 'ends:' .. b .. FS .. m, id)
    redis.call('ZREM', F .. 'firsts:' .. b, id)
    local charged = tonumber(r[12]) or 0
    if real < 0 then real = charged else note_cost(r[4], real) end
    charge_both(r[4], r[5], r[6], (real - charged) / tonumber(r[7]), -1)
    pass_on_load(b, m, id)
    return true
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
