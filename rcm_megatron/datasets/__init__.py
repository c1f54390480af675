"""Building datasets: sampled from a teacher, or encoded from videos."""
