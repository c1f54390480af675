"""What a process of a run needs beside its work: the lock, the watchdog, signals, timers."""
