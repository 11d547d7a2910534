-- Return the stream's last id and the state hash, read atomically: the job could end between two reads.
require_rights({ { 'EXISTS', KEYS[1] }, { 'XINFO', 'STREAM', KEYS[1] }, { 'HGETALL', KEYS[2] } })
return { top_of(KEYS[1]), redis.call('HGETALL', KEYS[2]) }
