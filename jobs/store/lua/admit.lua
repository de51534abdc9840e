-- ARGV: id, queue, model, client, kind, work, bytes, status data, idempotency key ('' for none),
-- its record, its seconds, priority; then the fields and values of the record. Returns {how many are
-- before it, image-steps to its end}. Runs inside admission's MULTI, sent whole: an EVALSHA that Redis
-- does not know would fail alone, and the rest be carried out.
local function key(id) return P .. 'job:' .. id end
local id, queue, client, work = ARGV[1], ARGV[2], ARGV[4], ARGV[6]
redis.call('SET', P .. 'admissions', 1)  -- touched: what it holds does not matter
redis.call('HSET', key(id), unpack(ARGV, 13))
for _, set in ipairs({'jobs', 'jobs:model:' .. ARGV[3], 'jobs:status:queued',
                      'queue:' .. queue .. ':queued'}) do
  redis.call('ZADD', P .. set, 0, id)
end
redis.call('SADD', P .. 'queues', queue)
add(P .. 'queue:' .. queue, 'admitted', work)
add(P .. 'clients', client, work)
add(P .. 'totals', 'output_bytes', ARGV[7])
add(P .. 'totals', 'admitted_' .. ARGV[5], 1)
redis.call('XADD', key(id) .. ':events', '*', 'event', 'status', 'data', ARGV[8])
local priority, work = ARGV[12], tonumber(work)
local place = math.max(clock(queue, priority), asked(queue, priority, client))
redis.call('ZADD', turns(queue, priority), place, id)
redis.call('HSET', shares(queue, priority), client, place + math.max(work, 1))
if ARGV[9] ~= '' then redis.call('SET', ARGV[9], ARGV[10], 'EX', ARGV[11]) end
local before = redis.call('ZRANK', turns(queue, priority), id)
if priority == 'normal' then before = before + redis.call('ZCARD', turns(queue, 'high')) end
return {before, ahead(queue, client, work, priority, place)}
