"""Everything that knows Redis: keys, records, admission, reading, writing, maintenance."""
