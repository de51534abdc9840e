-- ARGV: queue names. Recomputes every counter from the records, in one atomic step.
local clients = {}
for _, queue in ipairs(ARGV) do
  local outstanding = 0
  for _, status in ipairs({'queued', 'running'}) do
    local set = P .. 'queue:' .. queue .. ':' .. status
    for _, id in ipairs(redis.call('ZRANGE', set, 0, -1)) do
      local job = redis.pcall('HMGET', key(id), 'status', 'work', 'done', 'client')
      if job.err or job[1] ~= status then
        redis.call('ZREM', set, id)
      else
        local left = (tonumber(job[2]) or 0) - (tonumber(job[3]) or 0)
        outstanding = outstanding + left
        local client = job[4] or ''
        if left > 0 then clients[client] = (clients[client] or 0) + left end
      end
    end
  end
  for _, priority in ipairs(PRIORITIES) do
    for _, id in ipairs(redis.call('ZRANGE', turns(queue, priority), 0, -1)) do
      if not redis.call('ZSCORE', P .. 'queue:' .. queue .. ':queued', id) then
        leave(queue, id, '', 0, true)
      end
    end
    local now, asking = clock(queue, priority), redis.call('HGETALL', shares(queue, priority))
    for i = 1, #asking, 2 do
      if value(asking[i + 1]) <= now then
        redis.call('HDEL', shares(queue, priority), asking[i])  -- as good as new
      end
    end
  end
  local admitted = value(redis.call('HGET', P .. 'queue:' .. queue, 'admitted'))
  redis.call('HSET', P .. 'queue:' .. queue, 'completed', admitted - outstanding)
end
redis.call('DEL', P .. 'clients')
for client, left in pairs(clients) do redis.call('HSET', P .. 'clients', client, left) end
local bytes = 0
for _, id in ipairs(redis.call('ZRANGE', P .. 'jobs', 0, -1)) do
  local held = redis.pcall('HGET', key(id), 'bytes')
  bytes = bytes + (type(held) == 'string' and tonumber(held) or 0)
end
redis.call('HSET', P .. 'totals', 'output_bytes', bytes)
return bytes
