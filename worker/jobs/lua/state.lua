-- Return the stream's last id and the state hash, read atomically: the job could end between two reads.
return { top_of(KEYS[1]), redis.call('HGETALL', KEYS[2]) }
