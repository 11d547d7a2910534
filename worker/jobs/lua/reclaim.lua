-- Claim an entry that is pending as the caller has seen it, count a delivery, and return its fields.
-- Return false if it was renewed, claimed, settled or deleted since. An idle time can only grow without that.
-- KEYS: 1 queue. ARGV: 1 group, 2 consumer, 3 entry; as seen: 4 consumer, 5 deliveries, 6 idle ms.
require_rights({ { 'XPENDING', KEYS[1], ARGV[1] }, { 'XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3] } })
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)[1]
if not pending or pending[2] ~= ARGV[4] or pending[4] ~= tonumber(ARGV[5]) then return false end
if pending[3] < tonumber(ARGV[6]) then return false end
local claimed = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3])[1]
return claimed and claimed[2] or false
