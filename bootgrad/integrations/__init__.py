"""The library in other people's training loops; each module needs its framework, and nothing here imports one."""
