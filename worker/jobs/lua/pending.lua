-- Return the server's time and pending entries, read at the same time: id, consumer, idle ms, deliveries.
-- KEYS: 1 queue. ARGV: 1 group, 2 maximum number of entries.
require_rights({ { 'EXISTS', KEYS[1] }, { 'TIME' }, { 'XPENDING', KEYS[1], ARGV[1] } })
if redis.call('EXISTS', KEYS[1]) == 0 then return false end
return { redis.call('TIME'), redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', ARGV[2]) }
