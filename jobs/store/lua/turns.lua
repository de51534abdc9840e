-- Whose turn it is: start-time fair queueing. For each queue and priority, a sorted set of waiting
-- jobs by the place at which each begins, counted in image-steps of its client; what each client
-- has asked for so far; and a clock, the place of the job that was taken last. Who comes later
-- begins at the clock: nobody saves up, and nobody owes for a time when nobody waited.
local PRIORITIES = {'high', 'normal'}
local function turns(queue, priority) return P .. 'queue:' .. queue .. ':turns:' .. priority end
local function shares(queue, priority) return P .. 'queue:' .. queue .. ':shares:' .. priority end
local function clock(queue, priority)
  return value(redis.call('HGET', P .. 'queue:' .. queue, 'turn:' .. priority))
end
local function asked(queue, priority, client)
  return value(redis.call('HGET', shares(queue, priority), client))
end

-- A job waits no more. How it left is the client's gain or not: what is not run costs nothing.
local function leave(queue, id, client, work, served)
  for _, priority in ipairs(PRIORITIES) do
    local place = redis.call('ZSCORE', turns(queue, priority), id)
    if place then
      redis.call('ZREM', turns(queue, priority), id)
      if redis.call('EXISTS', turns(queue, priority)) == 0 then
        redis.call('DEL', shares(queue, priority))
        redis.call('HDEL', P .. 'queue:' .. queue, 'turn:' .. priority)
      elseif not served then
        add(shares(queue, priority), client, -math.max(work, 1))
      elseif tonumber(place) > clock(queue, priority) then
        redis.call('HSET', P .. 'queue:' .. queue, 'turn:' .. priority, place)
      end
    end
  end
end

-- Image-steps until a client's job has ended, its own among them, where each client gets the same
-- share: what the client itself has before it and with it, and of others no more than that each.
-- place: of a job that waits for its turn.
local function ahead(queue, client, work, priority, place)
  local behind = 0  -- of the same client
  for _, each in ipairs(PRIORITIES) do
    if place and each == priority then
      behind = behind + asked(queue, each, client) - place - work
    elseif not place or priority == 'high' then
      behind = behind + math.max(0, asked(queue, each, client) - clock(queue, each))
    end
  end
  local owed = redis.call('HGETALL', P .. 'clients')
  local own, others = 0, {}
  for i = 1, #owed, 2 do
    if owed[i] == client then own = value(owed[i + 1])
    else others[#others + 1] = value(owed[i + 1]) end
  end
  own = math.max(own - math.max(behind, 0), work)
  local all = own
  for _, left in ipairs(others) do all = all + math.min(left, own) end
  local ends = redis.call('HMGET', P .. 'queue:' .. queue, 'admitted', 'completed')
  local outstanding = value(ends[1]) - value(ends[2])
  return math.max(math.min(all, outstanding), work)  -- of other queues nothing is before it
end
