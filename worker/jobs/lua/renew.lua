-- Renew the lease: reset the idle time of an entry that is pending for this consumer, and return 1.
-- XCLAIM JUSTID does not count a delivery. With ARGV 4 and 5, give the entry back instead.
-- Otherwise return 0, or -1 if the entry was deleted and is pending for no other consumer.
-- KEYS: 1 queue. ARGV: 1 group, 2 consumer, 3 entry, 4 (optional) idle time and 5 delivery count to set.
require_rights({
  { 'EXISTS', KEYS[1] }, { 'XPENDING', KEYS[1], ARGV[1] }, { 'XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3] },
  { 'XRANGE', KEYS[1], '-', '+' }, { 'XINFO', 'GROUPS', KEYS[1] },
})
if redis.call('EXISTS', KEYS[1]) == 0 then return -1 end
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)[1]
if pending and pending[2] ~= ARGV[2] then return 0 end
local options = ARGV[4] and {'IDLE', ARGV[4], 'RETRYCOUNT', ARGV[5], 'JUSTID'} or {'JUSTID'}
if pending and redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], unpack(options))[1] then return 1 end
if not redis.call('XRANGE', KEYS[1], ARGV[3], ARGV[3])[1] then return -1 end

-- It is pending for no consumer. The server lost the delivery and repeats it; or XACK or XGROUP DELCONSUMER was called,
-- and no consumer would receive the entry again: FORCE restores it.
if not was_delivered(ARGV[1], ARGV[3]) then return 0 end
options[#options + 1] = 'FORCE'
return #redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], unpack(options))
