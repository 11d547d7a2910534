-- Add a job; return false if the queue is full.
-- KEYS: 1 queue. ARGV: 1 maximum length; then fields and values.
require_rights({ { 'XLEN', KEYS[1] }, { 'XADD', KEYS[1], '*', '', '' } })
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[1]) then return false end
return redis.call('XADD', KEYS[1], '*', unpack(ARGV, 2))
