-- ARGV: id, prefix of RQ's queue lists. A job with all that a view of it needs, in one round trip:
-- {record, index of outputs, place in the queue or -1, image-steps its queue has completed}.
local id = ARGV[1]
local queue = get(id, 'queue')
if not queue then return {} end
local place = -1
if get(id, 'status') == 'queued' then
  place = redis.call('LPOS', ARGV[2] .. queue, id) or -1
end
return {redis.call('HGETALL', key(id)), redis.call('HGETALL', key(id) .. ':index'), place,
        redis.call('HGET', P .. 'queue:' .. queue, 'completed') or '0'}
