-- What the scripts share. Above it stand P, the prefix of all keys, STATES, LEGAL, the moves there
-- are, and BOUNDS, of the histograms of seconds.
local function key(id) return P .. 'job:' .. id end
local function get(id, field) return redis.call('HGET', key(id), field) end
local function number(id, field) return tonumber(get(id, field) or '0') or 0 end

-- What frees memory must not be refused for want of it: Redis lets a script that has written
-- something go on, and a delete is always allowed.
local function begin_to_free() redis.call('DEL', P .. 'probe') end

local function emit(id, name, data)
  local maxlen = get(id, 'maxlen')
  redis.call('HINCRBY', key(id), 'events', 1)
  redis.call('XADD', key(id) .. ':events', 'MAXLEN', '~', maxlen, '*', 'event', name, 'data', data)
end

local function move(id, to)
  local from, queue = get(id, 'status'), get(id, 'queue')
  if not LEGAL[from .. '>' .. to] then error('job ' .. id .. ': ' .. from .. ' to ' .. to) end
  redis.call('ZREM', P .. 'jobs:status:' .. from, id)
  redis.call('ZREM', P .. 'queue:' .. queue .. ':' .. from, id)
  leave(queue, id, get(id, 'client') or '', number(id, 'work'), to == 'running')
  redis.call('ZADD', P .. 'jobs:status:' .. to, 0, id)
  if to == 'queued' or to == 'running' then
    redis.call('ZADD', P .. 'queue:' .. queue .. ':' .. to, 0, id)
  end
  redis.call('HSET', key(id), 'status', to)
end

-- Move `done` (image-steps) and with it what is outstanding, for the queue and the client.
local function advance(id, done)
  local delta = done - number(id, 'done')
  if delta == 0 then return end
  local client = get(id, 'client')
  redis.call('HSET', key(id), 'done', done)
  add(P .. 'queue:' .. get(id, 'queue'), 'completed', delta)
  if add(P .. 'clients', client, -delta) <= 0 then
    redis.call('HDEL', P .. 'clients', client)
  end
end

-- What was reserved for outputs becomes what is there.
local function set_bytes(id, bytes)
  add(P .. 'totals', 'output_bytes', bytes - number(id, 'bytes'))
  redis.call('HSET', key(id), 'bytes', bytes)
end

-- Count seconds since `from` for the metrics; of a damaged record nothing is known.
local function observe(what, id, from, now)
  local seconds = now - from
  if from <= 0 or seconds < 0 then return end
  local name = what .. ':' .. (get(id, 'kind') or '') .. ':' .. (get(id, 'model') or '') .. ':'
  local place = #BOUNDS
  for i, bound in ipairs(BOUNDS) do
    if seconds <= bound then place = i - 1 break end
  end
  add(P .. 'seconds', name .. place, 1)
  local sum = value(redis.call('HGET', P .. 'seconds', name .. 'sum'))
  redis.call('HSET', P .. 'seconds', name .. 'sum', string.format('%.17g', sum + seconds))
end

-- The end of a job that is queued or running.
local function finish(id, status, now, status_data, final, final_data)
  local done = number(id, 'done')
  advance(id, number(id, 'work'))
  redis.call('HSET', key(id), 'done', done, 'completed_at', now)
  local ttl = number(id, 'ttl_s')
  local inputs = redis.call('STRLEN', key(id) .. ':inputs')
  set_bytes(id, redis.call('HLEN', key(id) .. ':index') * number(id, 'unit') + inputs)
  redis.call('HSET', key(id), 'expires_at', now + ttl)
  redis.call('ZADD', P .. 'due', now + ttl, 'expire:' .. id)
  redis.call('DEL', key(id) .. ':state')
  for _, part in ipairs({':index', ':inputs', ':events'}) do
    redis.call('EXPIRE', key(id) .. part, ttl + 60)
  end
  redis.call('HDEL', key(id), 'eta_s')
  move(id, status)
  emit(id, 'status', status_data)
  emit(id, final, final_data)
  redis.call('EXPIRE', key(id) .. ':events', ttl + 60)
  add(P .. 'totals', 'jobs_' .. status, 1)
  if status == 'succeeded' then observe('run', id, number(id, 'started_at'), now) end
  redis.call('HDEL', P .. 'suspects', id)
  if get(id, 'webhook') == '1' then redis.call('ZADD', P .. 'webhooks', now, id) end
end

-- Running → queued.
local function give_back(id, status_data)
  redis.call('HDEL', key(id), 'execution', 'worker', 'eta_s')
  move(id, 'queued')
  emit(id, 'status', status_data)
end

-- What was counted when a worker fell silent: crashes, lone ones among them, and the time of it.
local function counted(id, worker)
  local said = get(id, 'blamed:' .. worker) or ''
  local crashes, lone, since = string.match(said, '^(%d+) (%d+) ([%d.]+)$')
  return tonumber(crashes) or 0, tonumber(lone) or 0, tonumber(since) or 0
end

-- What the end of a worker says of a job it had: nothing, unless the job was in the batch that was
-- being stepped, or was just being begun. A worker that goes on itself has not died. What is
-- counted is noted by worker: one that was only silent takes it back (return.lua).
local function blame(id, worker, now)
  local last, how = get(id, 'last_worker'), get(id, 'in_batch')
  redis.call('HDEL', key(id), 'in_batch')
  if not last or last == worker then return end
  redis.call('HDEL', key(id), 'last_worker')
  add(P .. 'totals', 'recovered', 1)
  local begun = redis.call('HGET', P .. 'begun', last) == id
  if how ~= 'alone' and how ~= 'shared' and not begun then return end
  local crashes, lone = counted(id, last)
  crashes = crashes + 1
  redis.call('HINCRBY', key(id), 'crashes', 1)
  if how == 'alone' then
    lone = lone + 1
    redis.call('HINCRBY', key(id), 'lone_crashes', 1)
  end
  redis.call('HSET', key(id), 'blamed:' .. last, crashes .. ' ' .. lone .. ' ' .. now)
end

local function blamed(id)
  local workers = {}
  for _, field in ipairs(redis.call('HKEYS', key(id))) do
    workers[#workers + 1] = string.match(field, '^blamed:(.*)$')
  end
  return workers
end

-- Lone crashes that may yet turn out to be silences, which began less than so many seconds ago.
local function unsettled(id, now, seconds)
  local found = 0
  for _, worker in ipairs(blamed(id)) do
    local _, lone, since = counted(id, worker)
    if math.abs(now - since) < seconds then found = found + lone end  -- the clock may be set back
  end
  return found
end

-- Nothing of what happened is held against the job.
local function clear(id)
  redis.call('HDEL', key(id), 'crashes', 'lone_crashes')
  for _, worker in ipairs(blamed(id)) do redis.call('HDEL', key(id), 'blamed:' .. worker) end
end

local function active(status) return status == 'queued' or status == 'running' end
local function held(id, execution)
  return get(id, 'status') == 'running' and get(id, 'execution') == execution
end

local PARTS = {
  [''] = 'hash', [':index'] = 'hash', [':state'] = 'hash',
  [':inputs'] = 'string', [':events'] = 'stream'}
local COUNTS = {
  work = 0, done = 0, bytes = 0, unit = 0, ttl_s = 0, events = 0, crashes = 0, lone_crashes = 0,
  best = 0, maxlen = 10000}

-- Whether there is a record; of one that was damaged or never was ours, whatever would stop the
-- scripts is put right, so that it can be ended and cleared away like any other.
local function mend(id)
  if redis.call('EXISTS', key(id)) == 0 then return false end
  for part, kind in pairs(PARTS) do
    local found = redis.call('TYPE', key(id) .. part).ok
    if found ~= 'none' and found ~= kind then redis.call('DEL', key(id) .. part) end
  end
  for _, field in ipairs({'queue', 'model', 'client'}) do
    redis.call('HSETNX', key(id), field, '')
  end
  for field, value in pairs(COUNTS) do
    local found = get(id, field)
    local whole = found and #found < 16 and string.match(found, '^%-?%d+$')
    if not whole and (found or value > 0) then redis.call('HSET', key(id), field, value) end
  end
  if not STATES[get(id, 'status')] then
    local queues = redis.call('SMEMBERS', P .. 'queues')
    for state in pairs(STATES) do
      redis.call('ZREM', P .. 'jobs:status:' .. state, id)
      for _, queue in ipairs(queues) do redis.call('ZREM', P .. 'queue:' .. queue .. ':' .. state, id) end
    end
    redis.call('HSET', key(id), 'status', 'queued')
  end
  return true
end
