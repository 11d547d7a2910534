-- Renew the lease: reset the idle time of an entry that is pending for this consumer; else return 0.
-- XCLAIM JUSTID does not count a delivery. With ARGV 4 and 5, give the entry back instead.
-- KEYS: 1 queue. ARGV: 1 group, 2 consumer, 3 entry, 4 (optional) idle time and 5 delivery count to set.
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)
if #pending == 0 or pending[1][2] ~= ARGV[2] then return 0 end
if ARGV[4] then
  return #redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'IDLE', ARGV[4], 'RETRYCOUNT', ARGV[5], 'JUSTID')
end
return #redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'JUSTID')
