"""The Lua scripts: each write of a job's progress or end is one of them, atomic and fenced.

Fenced: a worker names its execution id, and a script does nothing for one that no longer holds
the job. So a worker that was frozen while another took over writes nothing when it thaws.
"""

from __future__ import annotations

from jobs.states import TRANSITIONS
from jobs.store.keys import PREFIX

_LEGAL = ", ".join(
    f"['{source}>{target}'] = true"
    for source, targets in TRANSITIONS.items()
    for target in sorted(targets)
)

_PRELUDE = (
    f"local P = '{PREFIX}'\nlocal LEGAL = {{{_LEGAL}}}"
    + """
local function key(id) return P .. 'job:' .. id end
local function get(id, field) return redis.call('HGET', key(id), field) end
local function number(id, field) return tonumber(get(id, field) or '0') end

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
  redis.call('HINCRBY', P .. 'queue:' .. get(id, 'queue'), 'completed', delta)
  if redis.call('HINCRBY', P .. 'clients', client, -delta) <= 0 then
    redis.call('HDEL', P .. 'clients', client)
  end
end

-- What was reserved for outputs becomes what is there.
local function set_bytes(id, bytes)
  redis.call('HINCRBY', P .. 'totals', 'output_bytes', bytes - number(id, 'bytes'))
  redis.call('HSET', key(id), 'bytes', bytes)
end

-- The end of a job that is queued or running.
local function finish(id, status, now, status_data, final, final_data)
  local done = number(id, 'done')
  advance(id, number(id, 'work'))
  redis.call('HSET', key(id), 'done', done, 'completed_at', now)
  local ttl = number(id, 'ttl_s')
  local inputs = redis.call('STRLEN', key(id) .. ':inputs')
  set_bytes(id, redis.call('HLEN', key(id) .. ':outputs') * number(id, 'unit') + inputs)
  redis.call('HSET', key(id), 'expires_at', now + ttl)
  redis.call('ZADD', P .. 'due', now + ttl, 'expire:' .. id)
  redis.call('DEL', key(id) .. ':state')
  for _, part in ipairs({':outputs', ':index', ':inputs', ':events'}) do
    redis.call('EXPIRE', key(id) .. part, ttl + 60)
  end
  redis.call('HDEL', key(id), 'eta_s')
  move(id, status)
  emit(id, 'status', status_data)
  emit(id, final, final_data)
  redis.call('EXPIRE', key(id) .. ':events', ttl + 60)
  redis.call('HINCRBY', P .. 'totals', 'jobs_' .. status, 1)
  redis.call('HDEL', P .. 'suspects', id)
  if get(id, 'webhook') == '1' then redis.call('ZADD', P .. 'webhooks', now, id) end
end

local function active(status) return status == 'queued' or status == 'running' end
local function held(id, execution)
  return get(id, 'status') == 'running' and get(id, 'execution') == execution
end
"""
)

# ARGV: id, queue, model, client, kind, work, bytes, status data, idempotency key ('' for none),
# its record, its seconds; then the fields and values of the record. Runs inside admission's MULTI,
# sent whole: an EVALSHA that Redis does not know would fail alone, and the rest be carried out.
ADMIT = (
    f"local P = '{PREFIX}'"
    + """
local function key(id) return P .. 'job:' .. id end
local id, queue, client, work = ARGV[1], ARGV[2], ARGV[4], ARGV[6]
redis.call('INCR', P .. 'admissions')
redis.call('HSET', key(id), unpack(ARGV, 12))
for _, set in ipairs({'jobs', 'jobs:model:' .. ARGV[3], 'jobs:status:queued',
                      'queue:' .. queue .. ':queued'}) do
  redis.call('ZADD', P .. set, 0, id)
end
redis.call('SADD', P .. 'queues', queue)
redis.call('HINCRBY', P .. 'queue:' .. queue, 'admitted', work)
redis.call('HINCRBY', P .. 'clients', client, work)
redis.call('HINCRBY', P .. 'totals', 'output_bytes', ARGV[7])
redis.call('HINCRBY', P .. 'totals', 'admitted_' .. ARGV[5], 1)
redis.call('XADD', key(id) .. ':events', '*', 'event', 'status', 'data', ARGV[8])
if ARGV[9] ~= '' then redis.call('SET', ARGV[9], ARGV[10], 'EX', ARGV[11]) end
"""
)

# ARGV: id, prefix of RQ's queue lists. A job with all that a view of it needs, in one round trip:
# {record, index of outputs, place in the queue or -1, image-steps its queue has completed}.
VIEW = (
    _PRELUDE
    + """
local id = ARGV[1]
local queue = get(id, 'queue')
if not queue then return {} end
local place = -1
if get(id, 'status') == 'queued' then
  place = redis.call('LPOS', ARGV[2] .. queue, id) or -1
end
return {redis.call('HGETALL', key(id)), redis.call('HGETALL', key(id) .. ':index'), place,
        redis.call('HGET', P .. 'queue:' .. queue, 'completed') or '0'}
"""
)

# ARGV: id, execution, worker, now, digest, status data, canceled data, final data, provenance.
# Returns {what, attempts}: run, canceled, ended or missing.
START = (
    _PRELUDE
    + """
local id, execution, now = ARGV[1], ARGV[2], tonumber(ARGV[4])
local status = get(id, 'status')
if not status then return {'missing', 0} end
if not active(status) then return {'ended', 0} end
if get(id, 'cancel') == '1' then
  finish(id, 'canceled', now, ARGV[7], 'done', ARGV[8])
  return {'canceled', 0}
end
if get(id, 'execution') ~= execution then redis.call('HINCRBY', key(id), 'attempts', 1) end
redis.call('HSET', key(id), 'execution', execution, 'worker', ARGV[3], 'run_digest', ARGV[5],
           'provenance', ARGV[9])
redis.call('HSETNX', key(id), 'started_at', ARGV[4])
if status ~= 'running' then
  move(id, 'running')
  emit(id, 'status', ARGV[6])
end
return {'run', number(id, 'attempts')}
"""
)

# ARGV: id, execution, then operations:
#   p done t eta data | o field bytes meta event data | c index bytes | x index
# Returns a store.Fate: 0 not this execution's job, 1 written, 2 written, but stop the job.
WRITE = (
    _PRELUDE
    + """
local id = ARGV[1]
if not held(id, ARGV[2]) then return 0 end
local n = 3
while n <= #ARGV do
  local op = ARGV[n]
  if op == 'p' then
    local done = tonumber(ARGV[n + 1])
    if done > number(id, 'done') then
      redis.call('HINCRBY', P .. 'totals', 'image_steps', done - number(id, 'done'))
    end
    advance(id, done)
    if done > number(id, 'best') then redis.call('HSET', key(id), 'best', done, 'attempts', 0) end
    redis.call('HSET', key(id), 't', ARGV[n + 2], 'eta_s', ARGV[n + 3])
    emit(id, 'progress', ARGV[n + 4])
    n = n + 5
  elseif op == 'o' then
    redis.call('HSET', key(id) .. ':outputs', ARGV[n + 1], ARGV[n + 2])
    redis.call('HSET', key(id) .. ':index', ARGV[n + 1], ARGV[n + 3])
    emit(id, ARGV[n + 4], ARGV[n + 5])
    n = n + 6
  elseif op == 'c' then
    redis.call('HSET', key(id) .. ':state', ARGV[n + 1], ARGV[n + 2])
    n = n + 3
  else
    redis.call('HDEL', key(id) .. ':state', ARGV[n + 1])
    n = n + 2
  end
end
return get(id, 'cancel') == '1' and 2 or 1
"""
)

# ARGV: id, execution ('' for the janitor: any active job), status, now, status data,
# name and data of the last event, error, result. Returns 1 or 0 (lost).
FINISH = (
    _PRELUDE
    + """
local id = ARGV[1]
if ARGV[2] == '' then
  if not active(get(id, 'status')) then return 0 end
elseif not held(id, ARGV[2]) then return 0 end
if ARGV[8] ~= '' then redis.call('HSET', key(id), 'error', ARGV[8]) end
if ARGV[9] ~= '' then redis.call('HSET', key(id), 'result', ARGV[9]) end
finish(id, ARGV[3], tonumber(ARGV[4]), ARGV[5], ARGV[6], ARGV[7])
return 1
"""
)

# ARGV: id, execution ('' for the janitor), status data. Running → queued; not counted as an
# attempt when the worker itself gives the job back.
REQUEUE = (
    _PRELUDE
    + """
local id = ARGV[1]
if get(id, 'status') ~= 'running' then return 0 end
if ARGV[2] ~= '' then
  if get(id, 'execution') ~= ARGV[2] then return 0 end
  if number(id, 'attempts') > 0 then redis.call('HINCRBY', key(id), 'attempts', -1) end
end
redis.call('HDEL', key(id), 'execution', 'worker', 'eta_s')
move(id, 'queued')
emit(id, 'status', ARGV[3])
return 1
"""
)

# ARGV: id, now, status data, final data. Returns missing, canceled, requested or ended.
CANCEL = (
    _PRELUDE
    + """
local id, status = ARGV[1], get(ARGV[1], 'status')
if not status then return 'missing' end
if status == 'queued' then
  finish(id, 'canceled', tonumber(ARGV[2]), ARGV[3], 'done', ARGV[4])
  return 'canceled'
end
if status == 'running' then
  redis.call('HSET', key(id), 'cancel', 1)
  return 'requested'
end
return 'ended'
"""
)

_FORGET = """
local function forget(id)
  local status, queue, idem = get(id, 'status'), get(id, 'queue'), get(id, 'idempotency')
  advance(id, active(status) and number(id, 'work') or number(id, 'done'))
  set_bytes(id, 0)
  redis.call('ZREM', P .. 'jobs', id)
  redis.call('ZREM', P .. 'jobs:status:' .. status, id)
  redis.call('ZREM', P .. 'jobs:model:' .. get(id, 'model'), id)
  redis.call('ZREM', P .. 'queue:' .. queue .. ':' .. status, id)
  redis.call('ZREM', P .. 'due', 'expire:' .. id, 'forget:' .. id)
  redis.call('ZREM', P .. 'webhooks', id)
  redis.call('HDEL', P .. 'webhook_attempts', id)
  redis.call('HDEL', P .. 'suspects', id)
  if idem and idem ~= '' then redis.call('DEL', idem) end
  for _, part in ipairs({'', ':outputs', ':index', ':inputs', ':events', ':state'}) do
    redis.call('DEL', key(id) .. part)
  end
end
"""

# ARGV: id. Returns the queue's name, or '' where there was no such job.
PURGE = (
    _PRELUDE
    + _FORGET
    + """
local queue = get(ARGV[1], 'queue')
if not queue then return '' end
forget(ARGV[1])
return queue
"""
)

# ARGV: now, seconds a record outlives its outputs, most entries to handle. Returns how many.
SWEEP = (
    _PRELUDE
    + _FORGET
    + """
local now, record_ttl = tonumber(ARGV[1]), tonumber(ARGV[2])
local due = redis.call('ZRANGEBYSCORE', P .. 'due', '-inf', now, 'LIMIT', 0, ARGV[3])
for _, entry in ipairs(due) do
  redis.call('ZREM', P .. 'due', entry)
  local what, id = string.match(entry, '^(%a+):(.*)$')
  local status = get(id, 'status')
  if status and what == 'forget' then
    forget(id)
  elseif status and not active(status) then
    for _, part in ipairs({':outputs', ':index', ':inputs', ':events'}) do
      redis.call('DEL', key(id) .. part)
    end
    set_bytes(id, 0)
    if status ~= 'failed' then move(id, 'expired') end
    redis.call('ZADD', P .. 'due', now + record_ttl, 'forget:' .. id)
  end
end
return #due
"""
)

# ARGV: queue names. Recomputes every counter from the records, in one atomic step.
RECOUNT = (
    _PRELUDE
    + """
local clients = {}
for _, queue in ipairs(ARGV) do
  local outstanding = 0
  for _, status in ipairs({'queued', 'running'}) do
    local set = P .. 'queue:' .. queue .. ':' .. status
    for _, id in ipairs(redis.call('ZRANGE', set, 0, -1)) do
      local job = redis.call('HMGET', key(id), 'status', 'work', 'done', 'client')
      if job[1] ~= status then
        redis.call('ZREM', set, id)
      else
        local left = tonumber(job[2]) - tonumber(job[3] or '0')
        outstanding = outstanding + left
        if left > 0 then clients[job[4]] = (clients[job[4]] or 0) + left end
      end
    end
  end
  local admitted = tonumber(redis.call('HGET', P .. 'queue:' .. queue, 'admitted') or '0')
  redis.call('HSET', P .. 'queue:' .. queue, 'completed', admitted - outstanding)
end
redis.call('DEL', P .. 'clients')
for client, left in pairs(clients) do redis.call('HSET', P .. 'clients', client, left) end
local bytes = 0
for _, id in ipairs(redis.call('ZRANGE', P .. 'jobs', 0, -1)) do
  bytes = bytes + number(id, 'bytes')
end
redis.call('HSET', P .. 'totals', 'output_bytes', bytes)
return bytes
"""
)

# KEYS: lock. ARGV: token. Gives a lock back only if it is still ours.
UNLOCK = (
    "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
)
