-- ARGV: id, prefix of RQ's queue lists. A job with all that a view of it needs, in one round trip:
-- {record, index of outputs, place in the queue or -1, image-steps its queue has completed}.
local id = ARGV[1]
if redis.call('EXISTS', key(id)) == 0 then return {} end
local queue = get(id, 'queue') or ''
local place = -1
if get(id, 'status') == 'queued' then
  place = redis.call('LPOS', ARGV[2] .. queue, id) or -1
end
return {redis.call('HGETALL', key(id)), redis.call('HGETALL', key(id) .. ':index'), place,
        redis.call('HGET', P .. 'queue:' .. queue, 'completed') or '0'}
