# The Java SDK's part of the Makefile.

JAVA_IMAGE := build/java.binpb

.PHONY: client-java

ifeq ($(shell command -v javac >/dev/null && command -v mvn),)
client-java:
	$(call missing,JDK or Maven)
else
client-java: $(READY) $(JAVA_IMAGE) ## Check, build and test the Java SDK
	mvn -B -ntp -q -f client/java/pom.xml verify
	@touch client/java/target/.ready

client/java/target/.ready: $(JAVA_IMAGE) client/java/pom.xml $(shell find client/java/src/main -name '*.java')
	mvn -B -ntp -q -f client/java/pom.xml process-test-classes -Dmaven.test.skip
	@touch $@
endif

$(JAVA_IMAGE): $(LIGHT) client/java/image.py
	@$(BIN)/python client/java/image.py $(LIGHT) $@

test: client-java
