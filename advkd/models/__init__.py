"""The networks: teacher, student, discriminator, and the blocks they share."""
