-- Gives a call a slot, or a place in the queue.
-- ARGV: time; mode; process; call; group; client; its user; weight; 1 for a batch; ms that it may wait (0: not at all); most calls
-- and most tokens in the queue of its group; tokens of its prompt; ms that a lower tier must save (-1: never); ms for which a
-- conversation is remembered (0: not); when it arrived (0: now); its conversation; the beginning that it shares with others and
-- its tokens; how many prefixes, then each with its tokens; then the candidates (see read_call).
-- Answers {"go", backend, model, why, ms of its cost, tokens that are probably cached, ms until the first token, ms until the
-- scripts should run again}, {"wait", position, ms until the first token, ms until …, when it arrived} or {"full", ms until the
-- first token}.
local call = read_call(ARGV)
lease(call.pid)

local function go(e)
    return {'go', e.c.b, e.c.m, e.why, math.floor(e.prefill + e.c.service_ms), e.cached, math.floor(e.t - e.evict), until_wake()}
end

local is_first
if call.mode == 'order' then
    is_first = redis.call('SISMEMBER', F .. 'groups', call.group) == 0
else
    is_first = not is_waiting()
end
if is_first then
    local _, e = evaluate(call)
    if e.can and not keeps_back(call) then
        grant(call, e)
        return go(e)
    end
    rows, boxes, firsts = {}, {}, {}
end

local size = redis.call('HMGET', F .. 'size:' .. call.group, 'n', 't')
local n, t = tonumber(size[1] or 0), tonumber(size[2] or 0)
if call.patience <= 0 or not has_room(call, n, t, tonumber(ARGV[11]), tonumber(ARGV[12])) then
    local _, e = evaluate(call)
    return {'full', math.floor(math.min(NEVER, e.t + n * e.c.service_ms / slots_of(call)))}
end
-- Its place in a long queue, of which only the first calls are looked at.
local function place_in_queue()
    if redis.call('ZCARD', F .. 'line:' .. call.group .. ':' .. line_of(call)) > 1 then return n + 1 end
    for i, one in ipairs(in_order(call.group, MOST_OF_GROUP)) do
        if one.id == call.id then return i end
    end
    return n + 1
end

join_queue(call)
local outcome = (n < MOST_OF_GROUP or has_free_slot(call)) and dispatch(call.group)[call.id]
if outcome and outcome.granted then return go(outcome.e) end
local position = outcome and outcome.position or place_in_queue()
local ms = outcome and outcome.ms or position * call.cands[1].service_ms / slots_of(call)
return {'wait', position, math.floor(math.min(NEVER, ms)), until_wake(), call.arrived}
