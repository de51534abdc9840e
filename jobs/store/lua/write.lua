-- ARGV: id, execution, then operations:
--   p done t eta data | o name meta event data | c index bytes | x index |
--   b how: the job is in the batch shared, alone or not at all (''), or shared again and cleared
-- Returns a store.Fate: 0 not this execution's job, 1 written, 2 written, but stop the job.
local id = ARGV[1]
if not held(id, ARGV[2]) then return 0 end
local n = 3
while n <= #ARGV do
  local op = ARGV[n]
  if op == 'p' then
    local done = tonumber(ARGV[n + 1])
    if done > number(id, 'done') then
      add(P .. 'totals', 'image_steps', done - number(id, 'done'))
    end
    advance(id, done)
    if done > number(id, 'best') then redis.call('HSET', key(id), 'best', done) end
    redis.call('HSET', key(id), 't', ARGV[n + 2], 'eta_s', ARGV[n + 3])
    emit(id, 'progress', ARGV[n + 4])
    n = n + 5
  elseif op == 'o' then
    redis.call('HSET', key(id) .. ':index', ARGV[n + 1], ARGV[n + 2])
    emit(id, ARGV[n + 3], ARGV[n + 4])
    n = n + 5
  elseif op == 'c' then
    redis.call('HSET', key(id) .. ':state', ARGV[n + 1], ARGV[n + 2])
    n = n + 3
  elseif op == 'b' then
    local how = ARGV[n + 1]
    if how == 'cleared' then
      how = 'shared'
      clear(id)
    end
    redis.call('HSET', key(id), 'in_batch', how)
    n = n + 2
  else
    redis.call('HDEL', key(id) .. ':state', ARGV[n + 1])
    n = n + 2
  end
end
return get(id, 'cancel') == '1' and 2 or 1
