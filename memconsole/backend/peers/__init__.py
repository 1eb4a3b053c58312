"""Other processes: who is at the other end, how they are asked, whose turn it is, how long they are waited for."""
