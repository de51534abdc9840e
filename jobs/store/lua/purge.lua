-- ARGV: id. Returns the queue's name, or '' where there was no such job.
local queue = get(ARGV[1], 'queue')
if not queue then return '' end
forget(ARGV[1])
return queue
