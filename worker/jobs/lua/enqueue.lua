-- Add a job unless the queue holds as many as it may; false then. ARGV: 1 bound; then fields and values.
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[1]) then return false end
return redis.call('XADD', KEYS[1], '*', unpack(ARGV, 2))
