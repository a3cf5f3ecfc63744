-- Adds what one process has observed of the cost of calls to what all processes have.
-- KEYS: a hash of means by backend and model; its field `epoch` marks these data, so that processes notice their loss.
-- ARGV: decay of one observation; an epoch in case there is none; then triples: field, the means as this process knows them
-- if they are lost, and its observations. Means are a size, a time, and a value and a weight of each kind; observations are a
-- size, a time, and of each kind a number, a value and a weight.
-- Answers the epoch that was found, empty if none, the epoch that the hash has now, and the hash.
local function numbers(text)
  local list = {}
  for word in string.gmatch(text or '', '%S+') do
    local number = tonumber(word)
    if not number or number ~= number or math.abs(number) >= 1e15 then return {} end
    list[#list + 1] = number
  end
  return list
end

local decay = tonumber(ARGV[1])
local found = redis.call('HGET', KEYS[1], 'epoch')
if not found then
  redis.call('HSET', KEYS[1], 'epoch', ARGV[2])
end
for at = 3, #ARGV, 3 do
  local means = numbers(redis.call('HGET', KEYS[1], ARGV[at]))
  if #means < 2 then means = numbers(ARGV[at + 1]) end
  local seen = numbers(ARGV[at + 2])
  if seen[1] and seen[1] > 0 then means[1] = seen[1] end
  means[1], means[2] = means[1] or 0, math.max(means[2] or 0, seen[2] or 0)
  for kind = 0, (#seen - 2) / 3 - 1 do
    local rest, value, weight = decay ^ seen[3 + 3 * kind], 3 + 2 * kind, 4 + 2 * kind
    means[value] = (means[value] or 0) * rest + seen[4 + 3 * kind]
    means[weight] = (means[weight] or 0) * rest + seen[5 + 3 * kind]
  end
  for place, number in ipairs(means) do means[place] = string.format('%.17g', number) end
  redis.call('HSET', KEYS[1], ARGV[at], table.concat(means, ' '))
end
return {found or '', found or ARGV[2], redis.call('HGETALL', KEYS[1])}
