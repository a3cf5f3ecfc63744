-- The order of those who wait: that of the least virtual time of clients and their users, to whom it is charged what calls cost.

-- How many of the lines of a group that are looked at may be of batches, if there are too many for all.
local BATCH_LINES = 0.25
-- Of clients and users that have nothing in a group, so many keep their virtual time.
local MOST_IDLE = 1024
-- The most that a call is charged when it begins, in means of its group.
local MOST_MEANS = 2

-- Who has had no call for longest is forgotten, if there are many.
local function note_idle(group, name)
    local idle = F .. 'idle:' .. group
    redis.call('ZADD', idle, now, name)
    for _, old in ipairs(redis.call('ZRANGE', idle, 0, -MOST_IDLE - 1)) do
        local found = redis.call('HGET', F .. 'fair:' .. group, old)
        if found and tonumber(words(found)[2]) == 0 then redis.call('HDEL', F .. 'fair:' .. group, old, old .. '/*') end
        redis.call('ZREM', idle, old)
    end
end

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
        if n == 0 then note_idle(group, name) end
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

-- The calls of one user and one class are in line by arrival.
local function line_of(call) return call.batch == 1 and joined(call.name, 'batch') or call.name end

local function is_batch(line) return string.find(line, FS, 1, true) ~= nil end

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
        if line.name == line_of(call) then own = line end
        if line.owner == call.client then client = line.client end
    end
    if not own then
        own = {name = line_of(call), next = 0, client = client or {}, is_batch = call.batch == 1}
        lines[#lines + 1] = own
    end
    own.newcomer = call
    own.client.v = time_of(call.group, call.client, '*')
    own.v = own.client.v
    if call.sub ~= '' then own.v = time_of(call.group, call.name, call.client .. '/*') end
end

-- Of many lines those of the clients and users with the least virtual times; some of batches, because they may not yield for ever.
local function first_of_lines(lines, most)
    table.sort(lines, function(x, y)
        if x.client.v ~= y.client.v then return x.client.v < y.client.v end
        if x.v ~= y.v then return x.v < y.v end
        return x.name < y.name
    end)
    local first, of_batches, others = {}, 0, 0
    for _, line in ipairs(lines) do others = others + (line.is_batch and 0 or 1) end
    local most_of_batches = math.max(most - others, most * BATCH_LINES)
    for _, line in ipairs(lines) do
        if line.is_batch then of_batches = of_batches + 1 end
        if #first < most and (not line.is_batch or of_batches <= most_of_batches) then first[#first + 1] = line end
    end
    return first
end

-- The lines of a group with their first calls.
local function lines_of(group, most, newcomer)
    local names, lines, clients = redis.call('HKEYS', F .. 'lines:' .. group), {}, {}
    for i = 1, #names, 500 do
        local asked = {}
        for k = i, math.min(i + 499, #names) do
            asked[#asked + 1] = string.match(names[k], '^[^' .. FS .. ']*')
            asked[#asked + 1] = string.match(names[k], '^[^/' .. FS .. ']*')
        end
        local found = redis.call('HMGET', F .. 'fair:' .. group, unpack(asked))
        for k = 1, #asked, 2 do
            local name, owner = names[i + (k - 1) / 2], asked[k + 1]
            clients[owner] = clients[owner] or {v = found[k + 1] and tonumber(words(found[k + 1])[1]) or 0}
            local v = found[k] and tonumber(words(found[k])[1]) or 0
            lines[#lines + 1] = {
                name = name, owner = owner, next = 0, v = v, client = clients[owner], is_batch = is_batch(name),
            }
        end
    end
    if newcomer then add_newcomer(lines, newcomer) end
    local heads = {}
    for _, line in ipairs(#lines > most and first_of_lines(lines, most) or lines) do
        if next_in(group, line) then heads[#heads + 1] = line end
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

