"""What a federation needs on its machines: certificates, the configuration of Redis, users, enrolment files."""
