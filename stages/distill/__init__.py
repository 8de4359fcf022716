"""Make a smaller student and teach it the teacher's distribution."""
